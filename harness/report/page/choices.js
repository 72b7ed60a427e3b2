// What is chosen at the top: a task, a number of steps, words; and the columns and order of tables.

const choices = {
  task: document.getElementById("task"),
  steps: document.getElementById("steps"),
  words: document.getElementById("words"),
};
const tasks = [...document.querySelectorAll("section.task")];

function value(row, column) {
  const text = row.cells[column].textContent.trim(), number = parseFloat(text.replace(/,/g, ""));
  return Number.isNaN(number) || /[a-z]{3}/i.test(text) ? text : number;  // "1 of 3 seeds diverged"
}

function order(a, b) {  // numbers before words, empty cells last
  if (a === "" || b === "") return (a === "") - (b === "");
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return typeof a === "number" ? a - b : a.localeCompare(b);
}

function sortBy(table, column) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const down = heads[column].getAttribute("aria-sort") === "ascending";
  heads.forEach(head => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...body.rows].map((row, place) => ({row, place, key: value(row, column)}));
  rows.sort((a, b) => {
    const found = order(a.key, b.key), last = a.key === "" || b.key === "";
    return (down && !last ? -found : found) || a.place - b.place;
  });
  body.append(...rows.map(each => each.row));
}

function prepareTable(table) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.replaceChildren(button(head.textContent, () => sortBy(table, column)));
  });
  const place = table.closest(".scroll");
  const before = [...document.querySelectorAll("h2, h3, summary")].filter(
    each => each.compareDocumentPosition(place) & Node.DOCUMENT_POSITION_FOLLOWING);
  place.setAttribute("role", "region");
  place.setAttribute("aria-label", `Table: ${before.at(-1).textContent}`);
}

function showColumn(table, column, shown) {
  for (const row of table.rows) row.cells[column].hidden = !shown;
}

/** The boxes that choose columns of the table of all rows; those that decide are there at first. */
function columnsOf(table) {
  const heads = [...table.tHead.rows[0].cells], summary = made("summary", "");
  const count = () => {
    const shown = heads.filter(head => !head.hidden).length;
    summary.textContent = `Columns: ${shown} of ${heads.length}`;
  };
  const boxes = heads.slice(1).map((head, i) => {
    const box = made("input", "");
    box.type = "checkbox";
    box.checked = "deciding" in head.dataset;
    showColumn(table, i + 1, box.checked);
    box.addEventListener("change", () => { showColumn(table, i + 1, box.checked); count(); });
    return made("label", "", box, ` ${head.textContent}`);
  });
  const all = button("All", () => {
    for (const {firstChild: box} of boxes) if (!box.checked) box.click();
  });
  const deciding = heads.findIndex(head => "headline" in head.dataset);
  if (deciding > 0) sortBy(table, deciding);
  count();
  table.closest(".scroll").before(made("details", "columns", summary, ...boxes, all));
}

/** Hides a table's lines that do not fit the choice, and says so below it. */
function filterTable(table, fits) {
  const rows = [...table.tBodies[0].rows];
  for (const row of rows) row.hidden = !fits(row);
  const hidden = rows.filter(row => row.hidden).length;
  tell(table.closest(".scroll"), hidden, `${rows.length - hidden} of ${rows.length} lines`);
}

/** Hides columns for other numbers of steps, such as "FID, 2 steps". */
function filterColumns(table, steps) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const of = head.textContent.match(/, (\d+) steps?$/);
    if (of) showColumn(table, column, !steps || of[1] === steps);
  });
}

/** Hides plots and pictures without a row of the choice, and says so below them. */
function filterFigures(place, shown) {
  const figures = [...place.querySelectorAll("figure")];
  for (const figure of figures) {
    const rows = [figure, ...figure.querySelectorAll("[data-row]")].map(each => each.dataset.row);
    figure.hidden = !rows.some(row => shown.has(row));
  }
  const hidden = figures.filter(figure => figure.hidden).length;
  tell(place, hidden, `${figures.length - hidden} of ${figures.length} pictures`);
}

/** A sentence below something of which the choice hides a part. */
function tell(place, hidden, rest) {
  let told = place.nextElementSibling;
  if (!told?.classList.contains("hiding")) place.after(told = made("p", "hiding"));
  told.textContent = `${rest}; the choice at the top hides the others.`;
  told.hidden = !hidden;
}

function filterTask(task, steps, words) {
  const told = row => words.every(word => row.textContent.toLowerCase().includes(word));
  const taken = ({steps: of}) => !steps || !of || of.split(", ").includes(steps);
  const fits = row => told(row) && taken(row.dataset);
  const all = task.querySelector("table.all"), shown = new Set();
  for (const table of task.querySelectorAll("table.live")) {
    filterTable(table, fits);
    if (table !== all) filterColumns(table, steps);
  }
  const rows = all ? [...all.tBodies[0].rows] : [];
  for (const row of rows) if (!row.hidden) shown.add(row.dataset.row);
  for (const point of task.querySelectorAll("svg.plot a[data-row]")) {
    point.classList.toggle("pale", !shown.has(point.dataset.row));
  }
  for (const place of task.querySelectorAll(".figures")) filterFigures(place, shown);
  return `${shown.size} of ${rows.length} rows`;
}

function choose() {
  const words = choices.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  unname();
  for (const task of tasks) {
    task.hidden = task.dataset.task !== choices.task.value;
    if (task.hidden) continue;
    document.getElementById("count").textContent = filterTask(task, choices.steps.value, words);
  }
}

/** Offers the numbers of steps of a task, and keeps the one that was chosen if it has it. */
function offerSteps() {
  const before = choices.steps.value;
  const task = tasks.find(each => each.dataset.task === choices.task.value);
  const rows = [...task.querySelectorAll("table.all tr[data-steps]")];
  const found = new Set(rows.map(row => Number(row.dataset.steps)));
  const numbers = [...found].sort((a, b) => a - b).map(String);
  const offered = numbers.map(steps => new Option(steps, steps));
  choices.steps.replaceChildren(new Option("all", ""), ...offered);
  choices.steps.value = numbers.includes(before) ? before : "";
  choose();
}

function start() {
  document.querySelectorAll("table.live").forEach(prepareTable);
  document.querySelectorAll("table.all").forEach(columnsOf);
  watchPlots();
  watchRows();
  const rows = document.querySelectorAll("details.rows");  // the dialog shows them
  for (const each of rows) each.hidden = true;
  if (!tasks.length) return;
  choices.task.replaceChildren(...tasks.map(task => new Option(task.dataset.task)));
  choices.task.addEventListener("change", () => {
    unpick();  // rows of two tasks do not compare
    offerSteps();
  });
  choices.steps.addEventListener("change", choose);
  choices.words.addEventListener("input", choose);
  document.getElementById("choices").addEventListener("submit", event => event.preventDefault());
  for (const link of document.querySelectorAll('nav a[href^="#task-"]')) link.hidden = true;
  document.getElementById("choices").hidden = false;
  offerSteps();
}

start();
