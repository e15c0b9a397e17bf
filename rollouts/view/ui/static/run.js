// One run, live: the server says which of its files grew, and what is shown of them is asked for again.
import { refresh, stageCharts, chart } from "./charts.js";
import { ago, ask, badge, byId, clock, copy, data, el, empty, fill, keys, notices, number, query, released, table } from "./common.js";

let run = data.run, stage = run.stages.at(-1)?.name, source = null, drawnStages = "";
const id = run.run_id;
const OTHERS = { time: "where a step's time goes", timeline: "stages, faults and restarts", usage: "how busy the machine was" };

function head() {
  const parts = [run.experiment, run.target, run.begun_at ? `started ${ago(run.begun_at)}` : ""].filter(Boolean).join(" · ");
  fill(byId("heading"), el("h1", {}, id), badge(run.state), el("span.soft", {}, parts), run.tags.map((tag) => el("span.chip", {}, tag)),
    el("span.actions", {}, el("a.button", { href: `/compare?${query({ run: id })}` }, "Compare"),
      run.has_samples ? el("a.button.primary", { href: `/runs/${id}/samples` }, "Samples") : ""));
  fill(byId("remarks"), notices(run.remarks), ["failed", "died"].includes(run.state) && run.message ? notices([run.message], ".fault") : []);
}

function stats() {
  const progress = el("div.stat", {}, el("div.label", {}, run.stage ? `Step of ${run.stage}` : "Step"),
    el("div.value", {}, number(run.step), run.steps_total ? el("small", {}, ` / ${number(run.steps_total)}`) : ""),
    run.steps_total ? el("progress", { max: run.steps_total, value: run.step, "aria-label": "steps done" }) : "",
    run.eta ? el("div.soft", {}, `${run.eta} left`) : "");
  fill(byId("stats"), progress, run.headline.map((item) => el("div.stat", {}, el("div.label", { title: item.name }, item.name),
    el("div.value", {}, number(item.last)), el("div.soft", {}, `began at ${number(item.first)}`))));
}

function symptoms() {
  fill(byId("symptoms"), run.symptoms.map((found) => el("details.card.symptom", { "data-key": `${found.cause}/${found.stage}` }, el("summary", {}, el("b", {}, found.cause.replaceAll("_", " ")), ` in ${found.stage}: ${found.detail}`),
    el("p", {}, found.means.replaceAll("`", "")), el("p.soft", {}, `What to do: ${found.fix.replaceAll("`", "")}`))));
}

function curves() {
  const known = JSON.stringify(run.stages);
  if (known === drawnStages) return;
  if (!run.stages.some((item) => item.name === stage) || (drawnStages && run.stages.length > JSON.parse(drawnStages).length)) stage = run.stages.at(-1)?.name;
  drawnStages = known;
  fill(byId("stages"), run.stages.length > 1 ? run.stages.map((item) => el("button", { type: "button", "aria-pressed": String(item.name === stage), onclick: () => { stage = item.name; drawnStages = ""; curves(); } }, item.name)) : []);
  const chosen = run.stages.find((item) => item.name === stage);
  if (!chosen) return fill(byId("curves"), empty("No step was logged yet", "Curves appear with the first step."));
  const others = chosen.others.map((name) => chart({ run: id, stage, name: `chart:${name}` }, OTHERS[name]));
  const [grid, more] = stageCharts([id], chosen);
  grid.append(...others);
  const slow = chosen.slow.length ? [el("h3", {}, "Slow steps"), table(["step", "seconds", "of the median", "what grew", "meanwhile"], chosen.slow, { caption: "Slow steps", numbers: [0, 1, 2] })] : [];
  fill(byId("curves"), grid, more, slow);
}

function events() {
  const kind = byId("event-class").value;
  const rows = run.events.filter((item) => !kind || item.class === kind);
  fill(byId("events"), rows.map((item) => el(`li.${item.class}`, {}, el("time", { title: new Date(item.time * 1000).toLocaleString() }, clock(item.time)),
    el("span.what", {}, el("b", {}, item.kind.replaceAll("_", " ")), " ", item.text, item.log_tail ? el("details", { "data-key": `log/${item.time}` }, el("summary", {}, "end of its log"), el("pre", {}, item.log_tail)) : ""))),
    rows.length ? "" : el("li", {}, el("span"), el("span.soft", {}, "nothing of this kind")), run.events_left_out ? el("li", {}, el("span"), el("span.soft", {}, `${number(run.events_left_out)} earlier ones are in events.jsonl`)) : "");
}

function results() {
  const [header, ...rows] = run.evaluations;
  fill(byId("evaluations"), header ? table(header.map((name) => name || "metric"), rows, { caption: "Evaluations, the last of each stage", numbers: header.map((_, at) => at).slice(1) }) : empty("No held-out row was answered yet"));
  fill(byId("checkpoints"), run.checkpoints.length ? table(["checkpoint", "stage", "step", "here"], run.checkpoints.map((item) => [el("code", {}, item.path), item.stage, number(item.step), item.here ? "yes" : "on its host"]), { caption: "Checkpoints", numbers: [2] }) : empty("No checkpoint was saved yet"));
  fill(byId("environment"), el("div.card", {}, el("dl.facts", {}, run.environment.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]).flat())),
    run.packages.length ? el("details", { "data-key": "packages" }, el("summary", {}, `${run.packages.length} packages`), el("pre", {}, run.packages.join("\n"))) : "");
}

async function answers() {
  const changes = await ask(`/api/runs/${id}/answers`);
  const pair = (item) => el("div.card", {}, el("p.soft", {}, `row ${item.row}${item.expected ? `, expected ${item.expected}` : ""}`), el("pre.soft", {}, item.prompt), el("p.soft", {}, "before"), el("pre", {}, item.before), el("p.soft", {}, "after"), el("pre", {}, item.after));
  const rows = (key, title, tone, items, count) => items.length ? el("details", { "data-key": `${title}/${key}` }, el("summary", {}, el(`span.${tone}`, {}, `${title}: ${count}`), count > items.length ? ` (the first ${items.length})` : ""), items.map(pair)) : "";
  fill(byId("answers"), changes.map((change) => [el("h3", {}, `From ${change.before} to ${change.after}`), rows(change.after, "got better", "good", change.better, change.better_count), rows(change.after, "got worse", "bad", change.worse, change.worse_count)]).flat());
}

function config() {
  const words = byId("config-search").value.toLowerCase();
  const rows = run.config.filter((pair) => pair.join(" ").toLowerCase().includes(words));
  if (!rows.length) return fill(byId("config"), empty(run.config.length ? "No field fits" : "config.json is not here"));
  fill(byId("config"), el("div.scroll.config-box", { tabindex: 0, role: "region", "aria-label": "Fields of the config" }, el("table.config-table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "field"), el("th", { scope: "col" }, "value"))),
    el("tbody", {}, rows.map(([name, value]) => el("tr", {}, el("td", {}, name), el("td", {}, value)))))));
}

function windows() {
  const select = byId("log-window"), kept = select.value;
  fill(select, run.logs.map((name) => el("option", { value: name }, name)));
  select.value = run.logs.includes(kept) ? kept : run.logs[0] || "";
  if (!run.logs.length) byId("log").textContent = "No window has written anything yet.";
  return select.value !== kept;
}

// What says the same as before stays as it is, with what one has opened, marked or scrolled to.
const said = new Map();
function part(draw, ...values) {
  const now = JSON.stringify(values);
  if (said.get(draw) !== now) { said.set(draw, now); draw(); }
}

function show() {
  head(); stats(); curves();
  part(symptoms, run.symptoms);
  part(events, run.events, run.events_left_out);
  part(results, run.evaluations, run.checkpoints, run.environment, run.packages);
  part(config, run.config);
}

// Numbers come at once, the points of curves behind them: to draw many takes longer than a step of a small run.
let drawing = false, drawAgain = false;
async function newPoints() {
  drawAgain = drawing;
  if (drawing) return;
  drawing = true;
  try {
    await refresh([id]);
  } catch (error) {
    fill(byId("gone"), notices([error.message], ".fault"));
  }
  drawing = false;
  if (drawAgain) newPoints();
}

let asking = false, again = false;
async function update(files) {
  if (asking) { again = true; return; }
  asking = true;
  try {
    run = await ask(`/api/runs/${id}`);
    await released();
    show();
    if (windows()) listen();
    newPoints();
    if (files.includes("eval_samples.jsonl")) await answers();
    document.body.dataset.updated = Date.now();
  } catch (error) {
    fill(byId("gone"), notices([error.message], ".fault"));
  }
  asking = false;
  if (again) { again = false; update([]); }
}

function listen() {
  source?.close();
  source = new EventSource(`/api/runs/${id}/live?${query({ log: byId("log-window").value, told: run.version })}`);
  source.addEventListener("hello", () => { if (run.logs.length) byId("log").textContent = ""; fill(byId("gone")); document.body.dataset.live = "yes"; });
  source.addEventListener("changed", (event) => update(JSON.parse(event.data)));
  source.addEventListener("log", (event) => {
    const log = byId("log");
    log.append(JSON.parse(event.data));
    while (log.childNodes.length > 400) log.firstChild.remove();
    if (byId("log-follow").checked) log.scrollTop = log.scrollHeight;
  });
  source.addEventListener("gone", () => { source.close(); fill(byId("gone"), notices(["The directory of this run is gone: it was removed. What is shown was read before."], ".fault")); });
  const own = source;
  source.onerror = () => {
    fill(byId("gone"), notices(["The connection to the server is lost; it is tried again."], ".fault"));
    if (own.readyState === EventSource.CLOSED) refused(own); // the browser does not try again by itself
  };
}

// The server answers, and not with events: it was started anew and wants its new link, or the run is gone. It says which.
async function refused(own) {
  try {
    await ask(`/api/runs/${id}`);
  } catch (error) {
    fill(byId("gone"), notices([error.message], ".fault"));
  }
  setTimeout(() => { if (source === own) listen(); }, 3000);
}

show();
windows();
listen();
answers();
byId("event-class").addEventListener("change", events);
byId("config-search").addEventListener("input", config);
byId("log-window").addEventListener("change", listen);
addEventListener("pagehide", () => source?.close());
keys({
  s: ["samples of this run", () => { if (run.has_samples) location.href = `/runs/${id}/samples`; }],
  "/": ["search the config", () => byId("config-search").focus()],
  c: ["copy the run's name", () => copy(id, "the run's name")],
  u: ["all runs", () => { location.href = "/"; }],
});
