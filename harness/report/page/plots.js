// Plots: the point that is nearest to a pointer, or that has the focus, names its row.

const REACH = 24;  // how near a pointer must be, in units of the plot
const SAME = 3;    // points nearer than this to each other are named together
const MOST_TOGETHER = 6;

let named = null;  // the point whose name is shown

const place = point => [Number(point.dataset.x), Number(point.dataset.y)];
const between = ([a, b], [c, d]) => Math.hypot(a - c, b - d);
const livePoints = plot => [...plot.querySelectorAll("a[data-row]:not(.pale)")];

function nearest(plot, event) {
  const onScreen = new DOMPoint(event.clientX, event.clientY);
  const {x, y} = onScreen.matrixTransform(plot.getScreenCTM().inverse());
  let found = null, least = REACH;
  for (const point of livePoints(plot)) {
    const far = between(place(point), [x, y]);
    if (far < least) [found, least] = [point, far];
  }
  return found;
}

function unname() {
  if (!named) return;
  const figure = named.closest("figure");
  for (const marked of figure.querySelectorAll(".named")) marked.classList.remove("named");
  figure.querySelector(".tip")?.remove();
  named = null;
}

/** Shows the names of a point and of those that lie on it, and lifts its line from the others. */
function name(point) {
  if (point === named) return;
  unname();
  named = point;
  const figure = point.closest("figure"), plot = point.closest("svg");
  const others = livePoints(plot).filter(
    other => other !== point && between(place(other), place(point)) <= SAME);
  const names = [point, ...others].map(each => each.getAttribute("aria-label"));
  const more = names.length - MOST_TOGETHER, tip = document.createElement("div");
  tip.className = "tip";
  tip.textContent = names.slice(0, MOST_TOGETHER).join("\n");
  if (more > 0) tip.textContent += `\nand ${more} more here`;
  figure.append(tip);
  point.classList.add("named");
  const line = point.closest(".line");
  if (!line.classList.contains("alone")) line.classList.add("named");
  const box = figure.getBoundingClientRect(), spot = point.getBoundingClientRect();
  const left = spot.x - box.x + spot.width / 2 - tip.offsetWidth / 2;
  const above = spot.y - box.y - tip.offsetHeight - 8;
  tip.style.left = `${Math.max(0, Math.min(left, box.width - tip.offsetWidth - 2))}px`;
  tip.style.top = `${above >= 0 ? above : spot.bottom - box.y + 8}px`;
}

/** Titles become labels, and one point of each plot takes the focus; arrows go on from there. */
function preparePlot(plot) {
  for (const title of plot.querySelectorAll("title")) {
    title.parentElement.setAttribute("aria-label", title.textContent);
    title.remove();
  }
  const points = [...plot.querySelectorAll("a[data-row]")];
  points.forEach((point, i) => point.setAttribute("tabindex", i ? -1 : 0));
}

function goToNext(event) {
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
  const point = event.target.closest?.("svg.plot a[data-row]");
  if (!step || !point) return;
  const byPlace = (a, b) => place(a)[0] - place(b)[0] || place(b)[1] - place(a)[1];
  const points = livePoints(point.closest("svg")).sort(byPlace);
  const next = points[(points.indexOf(point) + step + points.length) % points.length];
  point.setAttribute("tabindex", -1);
  next.setAttribute("tabindex", 0);
  next.focus();
  event.preventDefault();
}

function watchPlots() {
  document.querySelectorAll("svg.plot").forEach(preparePlot);
  document.addEventListener("keydown", event => {
    if (event.key === "Escape") unname(); else goToNext(event);
  });
  document.addEventListener("focusin", event => {
    const point = event.target.closest("svg.plot a[data-row]");
    if (point?.matches(":focus-visible")) name(point); else unname();
  });
  document.addEventListener("pointermove", event => {
    if (event.pointerType === "touch") return;
    const plot = event.target.closest?.("svg.plot"), point = plot && nearest(plot, event);
    if (point) name(point); else if (!named?.matches(":focus-visible")) unname();
  });
  document.addEventListener("click", event => {  // a finger names first and opens by a second touch
    const plot = event.target.closest("svg.plot");
    if (!plot || event.detail === 0) return;  // 0 is a key on a link
    event.preventDefault();
    const point = nearest(plot, event), again = point === named;
    if (!point) unname();
    else if (event.pointerType === "touch" && !again) name(point);
    else openRow(point.dataset.row);
  });
  document.addEventListener("pointerover", event => {
    const item = event.target.closest?.("li[data-line]"), figure = item?.closest("figure");
    for (const line of document.querySelectorAll(".pointed")) {
      line.classList.remove("pointed", "named");
    }
    const line = figure?.querySelector(`.plot [data-line="${item.dataset.line}"]`);
    line?.classList.add("pointed", "named");
  });
}
