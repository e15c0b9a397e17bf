// Draws charts with vega-embed, which comes from this server, and gives them new points while a run goes on.
import { ask, el, query } from "./common.js";

let loading = null;
function vega() {
  loading ??= new Promise((done, failed) => {
    const script = el("script", { src: document.body.dataset.vega });
    script.onload = () => done(window.vegaEmbed);
    script.onerror = () => failed(new Error("the charts' script could not be loaded"));
    document.head.append(script);
  });
  return loading;
}

const scheme = matchMedia("(prefers-color-scheme: dark)");
function options() {
  const dark = scheme.matches, ink = dark ? "#c9c9d4" : "#45454f", grid = dark ? "#2c2c37" : "#ececf1";
  const axis = { labelColor: ink, titleColor: ink, gridColor: grid, domainColor: grid, tickColor: grid, labelFontSize: 11, titleFontSize: 11, titleFontWeight: 500 };
  const nothing = { load: () => Promise.reject(new Error("a page loads nothing")), sanitize: () => Promise.reject(new Error("no links")) };
  return {
    actions: false, renderer: "svg", ast: true, loader: nothing, tooltip: { theme: dark ? "dark" : "light" },
    config: { background: "transparent", axis, legend: { labelColor: ink, titleColor: ink }, view: { stroke: null }, font: "system-ui, sans-serif" },
  };
}

const drawn = new Map(); // element → {place, view}
const waiting = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { waiting.unobserve(entry.target); drawInTurn(entry.target); }
}, { rootMargin: "300px" });

// Charts come two at a time, each after the page was painted: numbers, keys and links do not wait for them.
const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
const lanes = [Promise.resolve(), Promise.resolve()];
let turns = 0;
function drawInTurn(element) {
  const lane = turns++ % lanes.length;
  lanes[lane] = lanes[lane].then(painted).then(() => draw(element));
}

async function draw(element) {
  const place = element.place;
  if (!element.isConnected) return;
  try {
    const spec = await ask(`/api/chart?${query(place)}`);
    const embed = await vega();
    element.replaceChildren();
    drawn.set(element, { place, view: (await embed(element, spec, options())).view });
    element.dataset.drawn = "yes";
  } catch (error) {
    element.replaceChildren(el("p.soft", {}, error.message));
    element.dataset.drawn = "failed";
  }
}

// A figure that is drawn once it is to be seen. place: {run: [...], stage, name}
export function chart(place, title) {
  const element = el("div.chart", { "data-key": `${place.stage}/${place.name}` }, el("p.soft", {}, "…"));
  element.place = place;
  waiting.observe(element);
  return el("figure", {}, el("figcaption", {}, title), element);
}

export function forget() {
  for (const [element, { view }] of drawn) if (!element.isConnected) { view.finalize(); drawn.delete(element); }
}

// New points for all charts of these runs that are drawn.
export async function refresh(runs) {
  forget();
  const curves = [...drawn].filter(([, { place }]) => !place.name.startsWith("chart:"));
  if (curves.length) {
    const found = await ask(`/api/curves?${query({ run: runs, curve: curves.map(([element]) => element.dataset.key) })}`);
    for (const [element, { view }] of curves) {
      const points = found[element.dataset.key];
      if (!points) continue;
      await painted();
      view.data("raw", points.raw).data("main", points.main);
      await view.runAsync();
      element.dataset.points = points.main.length;
    }
  }
  for (const element of document.querySelectorAll(".chart[data-drawn=failed]")) drawInTurn(element);
}

scheme.addEventListener("change", () => { for (const element of drawn.keys()) drawInTurn(element); });

// A stage's charts: the first ones, and the others where one asks for them.
export function stageCharts(runs, stage, label = (name) => name, by = "step") {
  const figure = (name) => chart({ run: runs, stage: stage.name, name, ...(by === "step" ? {} : { by }) }, label(name));
  const rest = el("div.grid", {});
  const more = el("details", { ontoggle: () => { if (!rest.children.length) rest.append(...stage.rest.map(figure)); } },
    el("summary", {}, `${stage.rest.length} more curves`), rest);
  return [el("div.grid", {}, stage.first.map(figure)), stage.rest.length ? more : ""];
}
