// Filters for a table in <div class="rows" data-filter="verdict,family">: a search in all cells, and a menu for each column named.
document.querySelectorAll("div.rows[data-filter]").forEach((box) => {
  const rows = [...box.querySelectorAll("tbody tr")];
  const names = [...box.querySelectorAll("thead th")].map((cell) => cell.textContent.trim());
  const bar = document.createElement("div");
  bar.className = "rows-filter";
  const search = document.createElement("input");
  search.type = "search";
  search.placeholder = "swin";
  search.setAttribute("aria-label", "Show rows that hold this text");
  const count = document.createElement("span");
  count.setAttribute("role", "status");
  const menus = (box.dataset.filter || "").split(",").map((name) => names.indexOf(name)).filter((at) => at >= 0).map((at) => {
    const menu = document.createElement("select");
    menu.setAttribute("aria-label", names[at]);
    menu.append(new Option(`any ${names[at]}`, ""));
    [...new Set(rows.map((row) => row.cells[at].textContent.trim()))].sort().filter(Boolean).forEach((text) => menu.append(new Option(text)));
    return { at, menu };
  });
  const show = () => {
    const wanted = search.value.trim().toLowerCase();
    let shown = 0;
    rows.forEach((row) => {
      const fits = menus.every(({ at, menu }) => !menu.value || row.cells[at].textContent.trim() === menu.value);
      row.hidden = !(fits && row.textContent.toLowerCase().includes(wanted));
      shown += !row.hidden;
    });
    count.textContent = `${shown} of ${rows.length}`;
  };
  bar.append(search, ...menus.map(({ menu }) => menu), count);
  bar.addEventListener("input", show);
  box.prepend(bar);
  show();
});

// Tables of numbers have rows of one line, too; their first column stays in sight.
document.querySelectorAll("table.docutils").forEach((table) => {
  const cells = [...table.querySelectorAll("tbody td:not(:first-child)")];
  if (cells.filter((cell) => /^[-+\d]/.test(cell.textContent.trim())).length > cells.length / 2) table.classList.add("numbers");
});
