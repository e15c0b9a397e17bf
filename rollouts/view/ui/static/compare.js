// Several runs over one another: curves, last numbers, held-out rows, configs.
import { stageCharts } from "./charts.js";
import { byId, data, el, empty, fill, keys, query, table } from "./common.js";

const chosen = data.chosen, found = data.comparison;
const by = new URLSearchParams(location.search).get("by") === "tokens" ? "tokens" : "step";
const go = (runs, over = by) => { location.href = `/compare?${query({ run: runs, ...(over === "step" ? {} : { by: over }) })}`; };
const axis = el("select", { id: "axis", onchange: () => go(chosen, axis.value) }, ["step", "tokens"].map((name) => el("option", { value: name, selected: name === by }, name === "step" ? "steps" : "trained tokens")));

fill(byId("known"), data.known.map((name) => el("option", { value: name })));
fill(byId("chosen"), chosen.map((name) => el("span.chip", {}, el("a", { href: `/runs/${name}` }, name), el("button", { type: "button", "aria-label": `leave out ${name}`, onclick: () => go(chosen.filter((other) => other !== name)) }, "×"))));
byId("chooser").addEventListener("submit", (event) => {
  event.preventDefault();
  const wanted = byId("search").value.trim();
  const name = data.known.includes(wanted) ? wanted : data.known.find((known) => wanted && known.startsWith(wanted));
  if (!name) return byId("search").setCustomValidity("no run begins so"), byId("search").reportValidity();
  go([...new Set([...chosen, name])]);
});
byId("search").addEventListener("input", () => byId("search").setCustomValidity(""));

const section = (title, ...parts) => el("section", {}, el("h2", {}, title), ...parts);

function shownWorse(runs) {
  return runs.map((item) => el("details", {}, el("summary", {}, item.run), item.rows.map((change) => el("p", {}, `From ${change.before} to ${change.after}: ${change.better_count} rows got better, ${change.worse_count} got worse`))));
}

if (!found) {
  fill(byId("comparison"), empty(chosen.length ? "One run is chosen" : "No run is chosen", "Add two or more by name, or mark them in the list of runs."));
} else {
  const [header, ...rows] = found.last;
  // the last stage's curves first: they are what one came for
  const over = el("p", { style: "margin-bottom: .75rem" }, el("label", {}, "over ", axis)), last = found.stages.at(-1);
  const [first, ...earlier] = found.stages.map((stage) => section(`Curves of ${stage.name}`, stage === last ? over : "", ...stageCharts(found.runs, stage, undefined, by))).reverse();
  fill(byId("comparison"), el("div.sections", {},
    first ?? "",
    section("Last numbers", table(header, rows, { caption: "Last numbers", numbers: header.map((_, at) => at).slice(1) })),
    ...found.equal_tokens.map(([head, ...lines]) => section("At equal tokens", table(head, lines, { caption: "Means over the last tenth of those tokens", numbers: head.map((_, at) => at).slice(1) }))),
    ...earlier.reverse(),
    section("Held-out rows", found.comparisons.length ? table(["run", "against", "points", "prompts"], found.comparisons.map((item) => [item.run, item.other, item.difference, String(item.paired)]), { caption: "Last evaluations, over the prompts that both answered", numbers: [2, 3] }) : empty("These runs answered no prompt in common"), ...shownWorse(found.changes)),
    section("Configs", ...found.differences.map((item) => el("div", {}, el("h3", {}, `${item.second} against ${item.first}`), item.rows.length ? table(["field", item.first, item.second], item.rows, { caption: `${item.second} against ${item.first}` }) : empty("No difference", "Config and code are the same."))))));
}
keys({ "/": ["add a run", () => byId("search").focus()], u: ["all runs", () => { location.href = "/"; }] });
