// Light or dark, as the system has it until it is switched; and the index, sorted and searched.
const root = document.documentElement, button = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
let switched = false;
function setTheme(dark) {
  root.dataset.theme = dark ? "dark" : "light";
  button.setAttribute("aria-pressed", String(dark));
}
setTheme(system.matches);
system.addEventListener("change", () => { if (!switched) setTheme(system.matches); });
button.addEventListener("click", () => { switched = true; setTheme(root.dataset.theme !== "dark"); });

const index = document.getElementById("index"), search = document.getElementById("search");
if (index) {
  const body = index.tBodies[0], rows = [...body.rows], heads = [...index.tHead.rows[0].cells];
  const value = (row, column) => Number(row.cells[column].dataset.value);
  heads.forEach((head, column) => {
    const press = head.querySelector("button");
    if (!press) return;
    press.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      // Those without a value come last, either way.
      const order = (a, b) => Number.isNaN(a) - Number.isNaN(b) || (down ? b - a : a - b);
      body.append(...rows.sort((a, b) => order(value(a, column), value(b, column))));
    });
  });
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    document.getElementById("shown").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  });
}
