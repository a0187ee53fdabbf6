"use strict";
const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");
const remembered = () => { try { return localStorage.getItem("loralab-theme"); } catch { return null; } };
const paint = theme => { root.dataset.theme = theme; };
paint(remembered() || (dark.matches ? "dark" : "light"));
dark.addEventListener("change", () => { if (!remembered()) paint(dark.matches ? "dark" : "light"); });
document.getElementById("theme").addEventListener("click", () => {
  const theme = root.dataset.theme === "dark" ? "light" : "dark";
  paint(theme);
  try { localStorage.setItem("loralab-theme", theme); } catch { /* a page from a file may not remember */ }
});

for (const table of document.querySelectorAll("table")) {
  const part = kind => document.querySelector(`${kind}[data-for="${table.id}"]`);
  const body = table.tBodies[0], given = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => {
    const cell = row.cells[i];
    return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent.trim().toLowerCase();
  };
  const compare = (a, b) => typeof a === "number"
    ? (Number.isNaN(a) ? 1 : Number.isNaN(b) ? -1 : a - b)
    : a.localeCompare(b, undefined, { numeric: true });
  const sort = (i, way) => {
    heads.forEach((head, k) => k === i ? head.setAttribute("aria-sort", way) : head.removeAttribute("aria-sort"));
    const sign = way === "descending" ? -1 : 1, rows = [...given];
    if (i >= 0) rows.sort((a, b) => {
      const x = value(a, i), y = value(b, i);
      return Number.isNaN(x) || Number.isNaN(y) ? compare(x, y) : sign * compare(x, y);
    });
    body.append(...rows);
  };
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const first = head.classList.contains("number") ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const now = head.getAttribute("aria-sort");
    if (now === other) sort(-1); else sort(i, now ? other : first);
  }));
  part("select").addEventListener("change", event => {
    const i = event.target.value === "" ? -1 : Number(event.target.value);
    sort(i, i >= 0 && heads[i].classList.contains("number") ? "descending" : "ascending");
  });
  const count = () => {
    const shown = given.filter(row => !row.hidden).length;
    part(".count").textContent = shown === given.length ? `${shown} row${shown === 1 ? "" : "s"}` : `${shown} of ${given.length} rows`;
  };
  part("input").addEventListener("input", event => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of given) {
      const text = [...row.cells].map(cell => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
    }
    count();
  });
  part(".columns")?.addEventListener("click", event => {
    event.target.setAttribute("aria-pressed", String(table.classList.toggle("all")));
  });
  count();
  const scroll = table.parentElement, bar = scroll.previousElementSibling;
  const cue = () => bar.classList.toggle("wide", scroll.scrollWidth > scroll.clientWidth + 1);
  new ResizeObserver(cue).observe(scroll);
  new ResizeObserver(cue).observe(table);
}
