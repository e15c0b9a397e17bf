// The list of runs: searched and filtered here, asked for again every two seconds.
import { ago, ask, badge, byId, data, el, empty, fill, keys, later, notices, number, query, released } from "./common.js";

const FIELDS = ["state", "experiment", "tag", "since"];
const form = byId("filters");
let list = data.list, marked = new Set(), at = -1;

function options(name, values) {
  const select = byId(name), kept = select.value || new URLSearchParams(location.search).get(name) || "";
  const known = [...new Set(values.filter(Boolean))].sort();
  if (kept && !known.includes(kept)) known.push(kept);
  fill(select, el("option", { value: "" }, "all"), known.map((value) => el("option", { value }, value)));
  select.value = kept;
}

function fitting() {
  const words = form.q.value.toLowerCase().split(/\s+/).filter(Boolean);
  const since = Number(form.since.value) ? list.now - Number(form.since.value) : 0;
  return list.runs.filter((run) => {
    const text = [run.run_id, run.experiment_name, run.target, run.state, run.message, ...(run.tags || [])].join(" ").toLowerCase();
    return words.every((word) => text.includes(word)) && (!form.state.value || run.state === form.state.value)
      && (!form.experiment.value || run.experiment_name === form.experiment.value)
      && (!form.tag.value || (run.tags || []).includes(form.tag.value)) && (run.started_at || 0) >= since;
  });
}

function row(run, place) {
  const box = el("input", { type: "checkbox", "aria-label": `compare ${run.run_id}`, onchange: (event) => mark(run.run_id, event.target.checked) });
  box.checked = marked.has(run.run_id);
  const where = [run.stage, run.step === null || run.step === undefined ? "" : `step ${number(run.step)}`].filter(Boolean).join(" · ");
  return el(place === at ? "tr.at" : "tr", {},
    el("td", {}, box),
    el("th.name", { scope: "row" }, el("a", { href: `/runs/${run.run_id}` }, run.run_id),
      el("div.chips", {}, run.experiment_name ? el("span.soft", {}, run.experiment_name) : "", (run.tags || []).map((tag) => el("span.chip", {}, tag)))),
    el("td", {}, badge(run.state)), el("td", {}, where || "–"), el("td.wide", {}, run.target),
    el("td.wide", {}, el("span", { title: run.started_at ? new Date(run.started_at * 1000).toLocaleString() : "" }, ago(run.started_at, list.now))),
    el("td.message.wide", {}, run.message || ""));
}

function mark(run, on) {
  if (on) marked.add(run); else marked.delete(run);
  byId("compare").disabled = marked.size < 2;
  byId("compare").textContent = marked.size > 1 ? `Compare ${marked.size}` : "Compare";
}

function show() {
  const runs = fitting();
  at = Math.min(at, runs.length - 1);
  byId("count").textContent = `${number(runs.length)} of ${number(list.runs.length)} on ${list.title}`;
  fill(byId("remarks"), notices(list.remarks));
  const focused = document.activeElement?.getAttribute?.("aria-label");
  if (!list.runs.length) fill(byId("runs"), empty("No runs yet", "Start one, and it shows up here:", el("code", {}, "deploy configs/00_cpu_sft_rl.py")));
  else if (!runs.length) fill(byId("runs"), empty("No run fits", "Fewer words or filters show more."));
  else {
    const names = ["run", "state", "where", "target", "started", "message"];
    fill(byId("runs"), el("div.scroll", { tabindex: 0, role: "region", "aria-label": "Runs" }, el("table.runs", {},
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, el("span.hidden", {}, "compare")), names.map((name, place) => el(place > 2 ? "th.wide" : "th", { scope: "col" }, name)))),
      el("tbody", {}, runs.map(row)))));
    if (focused?.startsWith("compare ")) document.querySelector(`[aria-label="${CSS.escape(focused)}"]`)?.focus();
  }
}

function asked() {
  return Object.fromEntries([["q", form.q.value], ...FIELDS.map((name) => [name, form[name].value])]);
}

function changed() {
  history.replaceState(null, "", `/?${query(asked())}`.replace(/\?$/, ""));
  show();
}

function newList(value) {
  list = value;
  options("state", list.runs.map((run) => run.state));
  options("experiment", list.runs.map((run) => run.experiment_name));
  options("tag", list.runs.flatMap((run) => run.tags || []));
  show();
}

let unread = false; // the last look failed, and the page says so
async function again() {
  if (!document.hidden) {
    try {
      const value = await ask("/api/runs");
      await released();
      if (unread || JSON.stringify({ ...value, now: 0 }) !== JSON.stringify({ ...list, now: 0 })) newList(value);
      unread = false;
    } catch (error) {
      unread = true;
      fill(byId("remarks"), notices([error.message], ".fault"));
    }
  }
  setTimeout(again, 2000);
}

function move(by) {
  const rows = [...document.querySelectorAll("tbody tr")];
  if (!rows.length) return;
  rows[at]?.classList.remove("at");
  at = Math.max(0, Math.min(rows.length - 1, at + by));
  rows[at].classList.add("at");
  rows[at].querySelector("a").focus({ preventScroll: true });
  rows[at].scrollIntoView({ block: "nearest" });
}

const words = new URLSearchParams(location.search);
form.q.value = words.get("q") || "";
form.since.value = words.get("since") || "";
newList(list);
form.addEventListener("submit", (event) => event.preventDefault());
form.q.addEventListener("input", later(changed, 80));
FIELDS.forEach((name) => form[name].addEventListener("change", changed));
byId("compare").addEventListener("click", () => { location.href = `/compare?${query({ run: [...marked] })}`; });
keys({
  "/": ["search", () => form.q.focus()],
  j: ["next run", () => move(1)], k: ["run before", () => move(-1)],
  Enter: ["open the run", () => document.querySelector("tr.at a")?.click()],
  x: ["mark for a comparison", () => document.querySelector("tr.at input")?.click()],
});
setTimeout(again, 2000);
