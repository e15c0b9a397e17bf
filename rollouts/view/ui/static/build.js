// The config builder: every field with what it means; each change is checked by the server at once.
import { ask, byId, data, el, empty, fill, keys, later, notices, place, table } from "./common.js";

let base = new URLSearchParams(location.search).get("base") || data.bases[0], fields = [], rows = new Map(), changes = new Map(), file = "", asking = 0;
const post = (what, value) => ask(`/api/build/${what}`, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(value) });
const settings = () => [...changes].map(([path, value]) => `${path}=${value}`);

function input(field) {
  const value = changes.get(field.path) ?? field.value;
  const set = (event) => {
    const now = event.target.value;
    if (now === field.value) changes.delete(field.path); else changes.set(field.path, now);
    event.target.closest(".setting").classList.toggle("changed", changes.has(field.path));
    check();
  };
  if (field.choices.length) {
    const select = el("select", { "aria-label": field.path, onchange: set }, field.choices.map((choice) => el("option", { value: choice }, choice)));
    if (!field.choices.includes(value)) select.append(el("option", { value }, value));
    select.value = value;
    return select;
  }
  return el("input", { type: "text", "aria-label": field.path, value, oninput: set, spellcheck: "false", autocomplete: "off" });
}

function setting(field) {
  if (field.group) return el("div.setting.group-head", {}, el("div", {}, el("b", {}, field.path), " ", el("span.soft", {}, field.value), el("p.soft", {}, field.meaning)), field.type.includes("None") || field.type.includes("|") ? input(field) : "");
  return el(`div.setting${changes.has(field.path) ? ".changed" : ""}`, {}, el("div", {}, el("code", {}, field.path), " ", el("span.soft", {}, field.type), el("p.soft", {}, field.meaning)), input(field));
}

// A search comes a moment after its last letter: a row that fits stays as it is, with what one types into it by then.
function show() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean), only = byId("only").checked;
  const fits = (field) => words.every((word) => `${field.path} ${field.meaning}`.toLowerCase().includes(word)) && (!only || changes.has(field.path));
  const fitting = fields.filter(fits).map((field) => rows.get(field));
  place(byId("fields"), fitting.length ? fitting : [empty("No field fits")]);
}

const check = later(async () => {
  const own = ++asking;
  byId("changed").textContent = changes.size ? `${changes.size} changed` : `as in ${base}`;
  try {
    const found = await post("check", { base, settings: settings(), gpu_memory_gib: Number(byId("memory-gib").value) || 80, other: byId("other").value });
    if (own !== asking) return;
    fill(byId("problems"), found.problems.length ? notices(found.problems, ".fault") : el("div.notice.fine", {}, "This config can run."));
    fill(byId("memory"), found.memory.length ? el("pre.card", { tabindex: 0 }, found.memory.join("\n")) : el("p.soft", {}, found.source ? "It runs on the CPU: no GPU's memory is planned." : "It cannot be told yet."));
    fill(byId("differences"), found.differences.length ? table(["field", "there", "here"], found.differences, { caption: "What differs" }) : el("p.soft", {}, "Nothing differs."));
    byId("source").textContent = found.source;
    byId("write-button").disabled = found.problems.length > 0;
    document.body.dataset.checked = String(own);
  } catch (error) {
    if (own === asking) fill(byId("problems"), notices([error.message], ".fault"));
  }
}, 250);

async function begin(name) {
  base = name;
  changes = new Map();
  try {
    fields = (await ask(`/api/build/fields?${new URLSearchParams({ base })}`)).fields;
    window.history.replaceState(null, "", `/build?${new URLSearchParams({ base })}`);
  } catch (error) {
    fields = [];
    fill(byId("problems"), notices(error.message.split("\n"), ".fault"));
  }
  rows = new Map(fields.map((field) => [field, setting(field)]));
  show();
  if (fields.length) check();
}

async function launch(start) {
  fill(byId("written"), el("p.soft", {}, start ? "Starting…" : "Planning…"));
  try {
    const said = await post(start ? "start" : "plan", { file });
    const go = el("button.primary", { type: "button", onclick: () => launch(true) }, `Start it on ${data.target}`);
    fill(byId("written"), el("p", {}, "Wrote ", el("code", {}, file)), el("pre.card", { tabindex: 0, id: "said" }, said.text), said.code === 0 && !start ? go : "", said.code === 0 && start ? el("a.button", { href: "/" }, "All runs") : "");
  } catch (error) {
    fill(byId("written"), notices([error.message], ".fault"));
  }
}

byId("write").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    file = (await post("write", { base, settings: settings(), file: byId("file").value.trim() })).file;
    fill(byId("written"), el("p", {}, "Wrote ", el("code", {}, file)), el("button", { type: "button", onclick: () => launch(false) }, "Show the plan"));
  } catch (error) {
    fill(byId("written"), notices([error.message], ".fault"));
  }
});

if (!data.bases.length) fill(byId("fields"), empty("Nothing to begin from", "Write a first config, in the directory where `deploy ui` was started:", el("code", {}, "deploy new my_run.py")));
else {
  for (const select of [byId("base"), byId("other")]) fill(select, data.bases.map((name) => el("option", { value: name }, name)));
  if (!data.bases.includes(base)) base = data.bases[0];
  byId("base").value = base;
  byId("other").prepend(el("option", { value: "", selected: true }, "where it began"));
  byId("other").value = "";
  begin(base);
}
byId("base").addEventListener("change", (event) => begin(event.target.value));
byId("other").addEventListener("change", check);
byId("memory-gib").addEventListener("input", check);
byId("search").addEventListener("input", later(show, 80));
byId("only").addEventListener("change", show);
byId("begin").addEventListener("submit", (event) => event.preventDefault());
keys({ "/": ["search the fields", () => byId("search").focus()], u: ["all runs", () => { location.href = "/"; }] });
