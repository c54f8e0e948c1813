() => {
  // Groups are read out by their names.
  const name = () => document.querySelectorAll("fieldset:not([aria-label])").forEach((group) => {
    const words = group.querySelector('[data-testid="block-info"]')?.textContent.trim() || group.id;
    group.setAttribute("role", group.querySelector("input[type=radio]") ? "radiogroup" : "group");
    group.setAttribute("aria-label", words);
  });
  name();
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  // What is typed into a menu looks for it, in the place of what is chosen.
  document.addEventListener("focusin", (event) => {
    if (event.target.matches("input[role=combobox]")) setTimeout(() => event.target.select());
  });
}
