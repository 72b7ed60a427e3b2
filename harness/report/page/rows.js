// What a row opens, and two rows side by side, in a dialog of copies of what stands in the page.

const dialog = document.getElementById("opened"), tray = document.getElementById("tray");
const picked = [];  // ids of the rows to compare, at most two

/** An element with a class and children; texts stay texts. */
function made(tag, kind, ...children) {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.append(...children);
  return element;
}

function button(text, action) {
  const found = made("button", "", text);
  found.type = "button";
  found.addEventListener("click", action);
  return found;
}

const nameOf = id => document.getElementById(id).dataset.name;

/** A copy without ids, which stay unique in the page. */
function copied(element) {
  const copy = element.cloneNode(true);
  for (const each of [copy, ...copy.querySelectorAll("[id]")]) each.removeAttribute("id");
  return copy;
}

/** A row's part of the page with its picture in the place of the link to it. */
function articleOf(id) {
  const article = copied(document.getElementById(id));
  const picture = document.getElementById(`picture-${id}`);
  if (picture) article.querySelector(".samples").replaceChildren(copied(picture));
  const command = article.querySelector(".command");
  const copy = () => navigator.clipboard?.writeText(command.textContent);
  if (!command.textContent.startsWith("#")) command.after(button("Copy", copy));
  return article;
}

/** The first children of an article, until one has a heading, in an element of their own. */
function cut(article, heading, kind) {
  const parts = [...article.children];
  const end = parts.findIndex(part => part.querySelector("h5")?.textContent === heading);
  return made("div", kind, ...parts.slice(0, end));
}

/** Copies of the plots with curves of rows, in which all other curves are pale. */
function curvesOf(...ids) {
  const task = document.getElementById(ids[0]).closest("section");
  const found = made("div", "figures");
  for (const figure of task.querySelectorAll("figure:not(.pareto):not(.grid)")) {
    if (!ids.some(id => figure.querySelector(`a[data-row="${id}"]`))) continue;
    const copy = copied(figure);
    copy.hidden = false;
    copy.classList.add("focused");
    copy.querySelector(".legend")?.remove();
    for (const point of copy.querySelectorAll("a.pale")) point.classList.remove("pale");
    ids.forEach((id, i) => {
      for (const point of copy.querySelectorAll(`a[data-row="${id}"]`)) {
        point.closest(".line").classList.add("chosen", i ? "second" : "first");
      }
    });
    for (const line of copy.querySelectorAll(".line.chosen")) line.parentElement.append(line);
    found.append(copy);
  }
  const text = found.children.length ? "Curves" : "No plot has a curve of this row.";
  return made("div", "", made(found.children.length ? "h5" : "p", "", text), found);
}

function show(title, ...content) {
  unname();
  document.getElementById("opened-title").textContent = title;
  const place = dialog.querySelector(".content");
  place.replaceChildren(...content);
  if (!dialog.open) dialog.showModal();
  place.scrollTop = 0;
}

/** Opens a row by its id. */
function openRow(id) {
  const article = articleOf(id), another = document.getElementById("with-another");
  article.querySelector("h4").remove();
  const numbers = cut(article, "Options and settings", "numbers");
  article.prepend(curvesOf(id));
  const other = picked.find(each => each !== id);
  another.hidden = false;
  another.textContent = other ? `Compare with ${nameOf(other)}` : "Compare with another row";
  another.onclick = () => {
    if (other) return compare(other, id);
    if (!picked.includes(id)) pick(id);
    dialog.close();
  };
  show(nameOf(id), made("div", "one", numbers, article));
}

/** Two rows side by side: their differences, then each with its picture, options and record. */
function compare(one, two) {
  document.getElementById("with-another").hidden = true;
  const [first, second] = [articleOf(one), articleOf(two)];
  first.classList.add("first");
  second.classList.add("second");
  markDifferences(first, second);
  const tops = [first, second].map(article => cut(article, "Numbers", article.className));
  show(`${nameOf(one)} and ${nameOf(two)}`, differences(one, two), made("div", "two", ...tops),
    curvesOf(one, two), made("div", "two", first, second));
}

/** Colours the options that only one of two rows has so. */
function markDifferences(first, second) {
  const text = row => row?.cells[1].firstChild?.textContent;
  const [mine, theirs] = [first, second].map(article => new Map(
    [...article.querySelectorAll(".options tr")].map(row => [row.cells[0].textContent, row])));
  for (const [rows, others] of [[mine, theirs], [theirs, mine]]) {
    for (const [key, row] of rows) {
      row.classList.toggle("differs", text(row) !== text(others.get(key)));
    }
  }
}

/** A number without the sign of a zero. */
const fixed = (number, digits) => number.toFixed(digits).replace(/^-(?=[0.]+$)/, "");

/** A mean over all seeds and noise sets. */
function meanOf(values) {
  const all = values.flatMap(Object.values);
  return sum(all) / all.length;
}

/** The table of each metric that both rows have, with the difference and its interval. */
function differences(one, two) {
  const [a, b] = [one, two].map(id => JSON.parse(document.getElementById(id).dataset.values));
  const metrics = JSON.parse(document.getElementById(one).closest("section").dataset.metrics);
  const body = made("tbody", "");
  let shared = null;
  for (const [metric, [heading, digits]] of Object.entries(metrics)) {
    const found = difference(a, b, metric);
    if (!found) continue;
    shared = found;
    const half = Number.isNaN(found.half) ? "" : ` ± ${found.half.toFixed(digits)}`;
    const means = [a, b].map(of => fixed(meanOf(of.metrics[metric]), digits));
    const cells = [...means, fixed(found.mean, digits) + half].map(text => made("td", "", text));
    const head = made("th", "", heading);
    head.scope = "row";
    body.append(made("tr", Math.abs(found.mean) > found.half ? "differs" : "", head, ...cells));
  }
  const heads = ["metric", "first", "second", "first − second"].map(text => made("th", "", text));
  const table = made("table", "gap", made("thead", "", made("tr", "", ...heads)), body);
  const parts = shared ? [meaningOf(shared), table] : [
    "No difference: the rows share no seed and noise set, or a seed of one diverged."];
  return made("div", "", made("h5", "", "Difference"), ...parts);
}

function meaningOf({seeds, sets, half}) {
  const several = (number, noun) => `${number} ${noun}${number > 1 ? "s" : ""}`;
  const shared = `${several(seeds, "training seed")} and ${several(sets, "noise set")}`;
  const paired = `Paired within ${shared}.`;
  return made("p", "", Number.isNaN(half)
    ? `${paired} One trained seed in common gives no interval.`
    : `${paired} ± is a 95 % interval; coloured where it leaves out 0. ` +
      "You chose the pair, and nothing corrects for how many were looked at.");
}

/** Adds a row to those to compare, or takes it away; a third takes the place of the first. */
function pick(id) {
  const at = picked.indexOf(id);
  if (at >= 0) picked.splice(at, 1); else picked.push(id);
  if (picked.length > 2) picked.shift();
  showPicked();
}

function showPicked() {
  for (const box of document.querySelectorAll(".pick")) {
    box.checked = picked.includes(box.value);
    box.closest("tr").classList.toggle("picked", box.checked);
  }
  tray.hidden = !picked.length;
  const names = picked.map(nameOf).join(" and ");
  const next = picked.length < 2 ? ": choose a second row to compare it with." : "";
  tray.replaceChildren(names + next);
  if (picked.length === 2) tray.append(button("Compare", () => compare(...picked)));
  tray.append(button("Clear", unpick));
}

function unpick() {
  picked.length = 0;
  showPicked();
}

function watchRows() {
  for (const row of document.querySelectorAll("table.all tr[data-row]")) {
    const box = made("input", "pick");
    box.type = "checkbox";
    box.value = row.dataset.row;
    box.setAttribute("aria-label", `Compare ${nameOf(row.dataset.row)}`);
    box.addEventListener("change", () => pick(box.value));
    row.cells[0].prepend(box);
  }
  document.getElementById("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
  document.addEventListener("click", event => {
    const link = event.target.closest('a[href^="#row-"]');
    if (!link || event.defaultPrevented) return;
    event.preventDefault();
    openRow(link.getAttribute("href").slice(1));
  });
  const opening = () => {
    const id = location.hash.slice(1);
    if (/^row-\d+$/.test(id) && document.getElementById(id)) openRow(id);
  };
  addEventListener("hashchange", opening);
  opening();
}
