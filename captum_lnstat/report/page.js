"use strict";
const list = document.getElementById("cards");
const cards = [...list.children];
const root = document.documentElement;
const classes = new Set(cards.map(card => card.dataset.class));
const stackOf = card => card.querySelector(".stack");
let shown = cards; // in the order on the page

const byConfidence = (a, b) => b.dataset.confidence - a.dataset.confidence;
const orders = {
  given: () => 0,
  surest: byConfidence,
  doubtful: (a, b) => byConfidence(b, a),
  class: (a, b) => a.dataset.class.localeCompare(b.dataset.class, "en") || byConfidence(a, b),
};

function heading(name) {
  const item = document.createElement("li");
  item.className = "heading";
  const count = cards.filter(card => card.dataset.class === name).length;
  item.appendChild(document.createElement("h2")).textContent = `${name}: ${count}`;
  return item;
}

function sort(order) {
  shown = [...cards].sort(orders[order]);
  // Of classes with an image or two each, headings would be most of the page.
  const headed = order === "class" && cards.length >= 3 * classes.size
    ? shown.flatMap((card, place) =>
      card.dataset.class === shown[place - 1]?.dataset.class ? [card] : [heading(card.dataset.class), card])
    : shown;
  list.replaceChildren(...headed);
  enter(shown[0], false);
}

// One picture at a time is in the order of Tab; the arrows go on from it.
function enter(card, focus = true) {
  list.querySelector(".stack[tabindex='0']")?.setAttribute("tabindex", "-1");
  if (!card) return;
  stackOf(card).tabIndex = 0;
  if (focus) stackOf(card).focus();
}

// The picture nearest to this one's column in the next row that way.
function beside(card, way) {
  const others = shown.filter(other => way * (other.offsetTop - card.offsetTop) > 0);
  const row = Math.min(...others.map(other => way * other.offsetTop));
  return others.filter(other => way * other.offsetTop === row)
    .sort((a, b) => Math.abs(a.offsetLeft - card.offsetLeft) - Math.abs(b.offsetLeft - card.offsetLeft))[0];
}

list.addEventListener("keydown", event => {
  const card = event.target.closest(".stack")?.parentElement;
  if (!card || event.ctrlKey || event.altKey || event.metaKey) return;
  const place = shown.indexOf(card);
  const next = {
    ArrowLeft: () => shown[place - 1], ArrowRight: () => shown[place + 1],
    ArrowUp: () => beside(card, -1), ArrowDown: () => beside(card, 1),
    Home: () => shown[0], End: () => shown.at(-1),
  }[event.key];
  if (!next) return;
  event.preventDefault();
  if (next()) enter(next());
});
list.addEventListener("click", event => {
  const stack = event.target.closest(".stack");
  if (!stack) return;
  stack.setAttribute("aria-pressed", stack.getAttribute("aria-pressed") !== "true");
  enter(stack.parentElement);
});
list.addEventListener("change", event => {
  for (const map of event.target.closest(".card").querySelectorAll("[data-of]")) {
    map.hidden = map.dataset.of !== event.target.value;
  }
});

document.getElementById("controls").addEventListener("submit", event => event.preventDefault());
document.getElementById("sort").addEventListener("change", event => sort(event.target.value));
document.getElementById("always").addEventListener("change", event => list.classList.toggle("always", event.target.checked));
document.getElementById("cover").addEventListener("input", event => document.body.style.setProperty("--cover", event.target.value));

const theme = document.getElementById("theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
const name = () => { theme.textContent = isDark() ? "Light" : "Dark"; theme.ariaLabel = `${theme.textContent} colours`; };
theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); });
dark.addEventListener("change", name);
name();
sort("given");
