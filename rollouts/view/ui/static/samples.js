// The rollout browser: a list that filters, and the sample that is looked at. The address holds both: it is a link.
import { ask, byId, copy, data, el, empty, fill, keys, later, number, query, released, say } from "./common.js";
import { colourings, responseTokens } from "./tokens.js";
import { group, head, history, metadata, turns } from "./sample_parts.js";

const id = data.run_id, form = byId("filters"), base = `/runs/${id}/samples`;
const NAMES = ["text", "step_min", "step_max", "reward_min", "reward_max", "length_min", "length_max", "finish", "contrast", "order"];
let shown = [], next = null, sample = null, prompt = "", asking = 0, colouring = "plain";

function asked() {
  const values = Object.fromEntries(NAMES.map((name) => [name, form[name].value.trim()]));
  if (values.order === "-step") values.order = "";
  return { ...values, prompt };
}

const link = (offset) => `${base}?${query({ ...asked(), sample: offset })}`;

function readAddress() {
  const words = new URLSearchParams(location.search);
  prompt = words.get("prompt") || "";
  const finish = words.get("finish");
  if (finish && ![...form.finish.options].some((option) => option.value === finish)) form.finish.append(el("option", { value: finish }, finish));
  for (const name of NAMES) form[name].value = words.get(name) || (name === "order" ? "-step" : "");
  return words.get("sample");
}

function chip() {
  fill(byId("prompt-chip"), prompt ? el("span.chip", {}, `prompt ${prompt}`, el("button", { type: "button", "aria-label": "any prompt", onclick: () => { prompt = ""; filter(); } }, "×")) : []);
}

function item(one) {
  const current = sample && one.offset === sample.offset;
  return el("li", {}, el("a", { href: link(one.offset), "data-offset": one.offset, "aria-current": current ? "true" : null, onclick: (event) => { if (!event.ctrlKey && !event.metaKey && !event.shiftKey) { event.preventDefault(); open(one.offset); } } },
    el("span.line", {}, el("b", {}, number(one.reward)), ` step ${one.step} · group ${one.group} · ${number(one.length)} tokens`, one.contrast ? "" : el("span.flat", { title: "all rewards of its group are the same: it teaches nothing" }, "no contrast")),
    el("span.say.asked", {}, one.prompt), el("span.say", {}, one.response || "(empty)")));
}

function progress(index) {
  const part = index.total ? index.indexed / index.total : 1;
  const lines = [];
  if (index.failed) lines.push(el("div.notice.fault", {}, "The index of these samples could not be made: is the disk of the cache full? It is tried again."));
  else if (index.building && part < 0.999) lines.push(el("div.card.bar", {}, el("span", {}, `Indexing: ${number(index.count)} samples so far, ${Math.floor(100 * part)} % of ${number(index.total / 1e6, 3)} MB. What is indexed can be looked at.`), el("progress", { max: 1, value: part, "aria-label": "indexed" })));
  if (index.damaged) lines.push(el("div.notice", {}, `${number(index.damaged)} line(s) of rollouts.jsonl are damaged, and left out.`));
  fill(byId("progress"), lines);
  return index.building;
}

let watching = 0, building = false;
function take(answer, add) {
  building = progress(answer.index);
  const total = answer.index.count;
  shown = add ? [...shown, ...answer.samples] : answer.samples;
  next = answer.next;
  const options = answer.bounds.finish || [];
  for (const reason of options) if (![...form.finish.options].some((option) => option.value === reason)) form.finish.append(el("option", { value: reason }, reason || "(none)"));
  const searching = asked().text !== "";
  byId("count").textContent = searching ? `${number(shown.length)} found${next === null ? "" : ` so far, ${number(next)} of ${number(answer.fitting)} read`}` : `${number(answer.fitting)} of ${number(total)} samples`;
  if (shown.length) fill(byId("list"), shown.map(item));
  else fill(byId("list"), el("li", {}, total ? empty(searching && next !== null ? "Searching…" : "No sample fits", "Fewer filters show more.") : empty(building ? "Indexing…" : "No samples yet", building ? "The first ones appear in a moment." : "They come with the first step of RL.")));
  byId("more").hidden = next === null;
  document.body.dataset.shown = String(asking);
  clearTimeout(watching);
  if (building || !total) watching = setTimeout(() => load(false, true), building ? 700 : 3000);
}

async function load(add, quiet = false) {
  const own = ++asking;
  if (quiet && shown.length > 50) return; // one looks further down: leave it as it is
  let begin = add ? next : 0, first = !add;
  try {
    for (;;) {
      const answer = await ask(`/api/runs/${id}/samples?${query({ ...asked(), begin })}`);
      if (quiet) await released();
      if (own !== asking) return;
      take(answer, !first);
      first = false;
      if (!asked().text || answer.next === null || shown.length >= 50) break;
      begin = answer.next; // a search goes on until the list is full
    }
  } catch (error) {
    if (quiet) watching = setTimeout(() => load(false, true), 3000); // what is shown stays
    else if (own === asking) fill(byId("list"), el("li", {}, empty("This cannot be shown", error.message)));
  }
}

function filter() {
  window.history.replaceState(null, "", `${base}?${query({ ...asked(), sample: sample?.offset })}`);
  chip();
  return load(false);
}

async function open(offset, { push = true, focus = false } = {}) {
  try {
    sample = await ask(`/api/runs/${id}/samples/${offset}`);
  } catch (error) {
    if (building) setTimeout(() => open(offset, { push, focus }), 1000); // its line may not be indexed yet
    return fill(byId("detail"), building ? empty("Indexing…", "The sample is shown as soon as it is found.") : empty("This sample cannot be shown", error.message));
  }
  if (push) window.history.pushState(null, "", link(offset));
  document.body.classList.add("open");
  detail();
  for (const anchor of document.querySelectorAll(".samples a")) {
    const here = anchor.dataset.offset === String(offset);
    if (here) { anchor.setAttribute("aria-current", "true"); anchor.scrollIntoView({ block: "nearest" }); if (focus) anchor.focus({ preventScroll: true }); } else anchor.removeAttribute("aria-current");
  }
}

function detail() {
  const actions = { copy: copyText, link: () => copy(location.href, "the link"), back, same: () => { prompt = sample.prompt_id; form.order.value = "step"; document.body.classList.remove("open"); filter(); } };
  const tokens = el("div");
  const draw = () => fill(tokens, responseTokens(sample, colouring));
  const choice = el("div.segments", { role: "group", "aria-label": "Colour tokens by" }, colourings(sample).map(({ name, label, off }) => el("button", { type: "button", "aria-pressed": String(name === colouring), disabled: Boolean(off), title: off || "", onclick: () => choose(name) }, label)));
  const choose = (name) => { colouring = name; for (const [at, button] of [...choice.children].entries()) button.setAttribute("aria-pressed", String(colourings(sample)[at].name === name)); draw(); };
  draw();
  fill(byId("detail"), head(sample, actions), el("div", {}, turns(sample.parts)),
    el("section", {}, el("div.section-head", {}, el("h2", {}, "Tokens"), choice), el("div.card", {}, tokens)),
    el("section", {}, el("h2", {}, `Its group: ${sample.group_size} samples`, sample.contrast ? "" : [" ", el("span.flat", {}, "no contrast")]), group(sample, link, open)),
    history(sample, link, open), metadata(sample));
  document.body.dataset.sample = sample.offset;
}

function copyText() {
  if (sample) copy(`${sample.prompt}\n\n${sample.response}`, "prompt and response"); else say("Open a sample first.");
}

function back() {
  document.body.classList.remove("open");
  byId("list").querySelector("a[aria-current]")?.focus();
}

async function move(by) {
  const at = shown.findIndex((one) => one.offset === sample?.offset);
  const to = at < 0 ? 0 : at + by;
  if (to >= shown.length && next !== null) await load(true);
  if (to >= 0 && to < shown.length) open(shown[to].offset, { focus: true });
}

function sibling(by) {
  const all = sample?.siblings || [], at = all.findIndex((one) => one.offset === sample.offset);
  if (all[at + by]) open(all[at + by].offset);
}

byId("run-link").textContent = id;
byId("run-link").href = `/runs/${id}`;
const first = readAddress();
chip();
take(data.list, false);
if (asked().text && data.list.next !== null && shown.length < 50) load(false);
if (first) open(first, { push: false });
else fill(byId("detail"), empty("No sample is open", "Choose one from the list, or press j."));
form.addEventListener("submit", (event) => { event.preventDefault(); filter(); });
form.addEventListener("input", later(filter, 150));
byId("clear").addEventListener("click", () => { form.reset(); prompt = ""; filter(); });
byId("more").addEventListener("click", () => load(true));
addEventListener("popstate", () => { const offset = readAddress(); chip(); load(false); if (offset) open(offset, { push: false }); else back(); });
keys({
  "/": ["search", () => form.text.focus()],
  j: ["next sample", () => move(1)], k: ["sample before", () => move(-1)],
  l: ["next of its group", () => sibling(1)], h: ["the one before in its group", () => sibling(-1)],
  c: ["copy prompt and response", copyText],
  Escape: ["back to the list", back],
  u: ["the run", () => { location.href = `/runs/${id}`; }],
});
