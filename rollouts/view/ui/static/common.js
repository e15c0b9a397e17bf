// What all pages share. Text of a host or a model only ever becomes text: nothing here writes HTML.
export const data = JSON.parse(document.getElementById("data").textContent);

// el("a.name", {href}, "text", child): an element with a class, attributes and children.
export function el(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name || "div");
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

export const byId = (id) => document.getElementById(id);
// What was opened in it stays open, by its data-key.
export function fill(place, ...children) {
  const opened = new Set([...place.querySelectorAll("details[open][data-key]")].map((item) => item.dataset.key));
  place.replaceChildren(...children.flat().filter((child) => child !== null && child !== ""));
  for (const item of place.querySelectorAll("details[data-key]")) if (opened.has(item.dataset.key)) item.open = true;
}

// Have a place hold these children, and touch none that is in its order already: what has the focus keeps it.
export function place(parent, children) {
  const kept = new Set(children);
  for (const child of [...parent.children]) if (!kept.has(child)) child.remove();
  let at = parent.firstChild;
  for (const child of children) {
    if (child === at) at = at.nextSibling; else parent.insertBefore(child, at);
  }
}

// What is replaced between the press and the release of a button gets no click: what is drawn by itself waits for the release.
let press = null, over = null;
addEventListener("pointerdown", (event) => { if (event.button === 0) press ??= new Promise((done) => { over = done; }); }, true);
const release = (event) => { if (press && !event.buttons) { setTimeout(over); press = null; } };
for (const kind of ["pointerup", "pointercancel", "pointermove"]) addEventListener(kind, release, true); // a scrollbar tells of no release
addEventListener("blur", release);
export const released = () => press;

export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer: it has ended, or this machine sleeps. `deploy ui` starts it again.");
  }
  const type = answer.headers.get("content-type") || "";
  const value = type.includes("json") ? await answer.json() : { error: await answer.text() };
  if (!answer.ok) throw new Error(value.error || `the server answered ${answer.status}`);
  return value;
}

export function query(values) {
  const words = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    for (const item of Array.isArray(value) ? value : [value]) if (item !== "" && item !== null && item !== undefined) words.append(name, item);
  }
  return words.toString();
}

export function number(value, digits = 4) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size !== 0 && (size >= 1e6 || size < 1e-3) ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
}

export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString("en-GB");
}

export function ago(seconds, now = Date.now() / 1000) {
  if (!seconds) return "–";
  const past = Math.max(0, now - seconds);
  const [size, unit] = past < 90 ? [1, "s"] : past < 5400 ? [60, "min"] : past < 129600 ? [3600, "h"] : [86400, "d"];
  return `${Math.round(past / size)} ${unit} ago`;
}

export const badge = (state) => el(`span.badge.${String(state).replace(/[^a-z]/g, "-")}`, {}, state);

let shown = 0;
export function say(text) {
  byId("announce").textContent = text;
  const own = ++shown;
  setTimeout(() => { if (own === shown) byId("announce").textContent = ""; }, 4000);
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    say(`Copied ${what}.`);
  } catch {
    say("The browser does not let this page copy.");
  }
}

export const notices = (texts, kind = "") => texts.map((text) => el(`div.notice${kind}`, {}, text));

export function empty(title, ...lines) {
  return el("div.empty", {}, el("h3", {}, title), ...lines.map((line) => el("p", {}, line)));
}

export function table(header, rows, { caption = "", numbers = [], kind = "" } = {}) {
  const cell = (tag, value, at) => el(numbers.includes(at) ? `${tag}.number` : tag, tag === "th" ? { scope: "row" } : {}, value);
  return el("div.scroll", { tabindex: 0, role: "region", "aria-label": caption || header.join(", ") },
    el(`table${kind}`, {},
      el("thead", {}, el("tr", {}, header.map((name, at) => el(numbers.includes(at) ? "th.number" : "th", { scope: "col" }, name || el("span.hidden", {}, "name"))))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value, at) => cell(at === 0 ? "th" : "td", value, at)))))));
}

// keys({j: ["next", fn]}): what a key does where nobody is typing; ? lists them all.
export function keys(bindings) {
  const all = { "?": ["show these keys", () => byId("keys").showModal()], ...bindings };
  fill(byId("keys-list"), Object.entries(all).map(([key, [what]]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, what)]).flat());
  byId("keys-button").addEventListener("click", () => byId("keys").showModal());
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input:not([type=checkbox]), select, textarea, [contenteditable]");
    if (event.key === "Escape" && typing) typing.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
    const bound = all[event.key];
    if (bound && !(event.key === "Enter" && event.target.closest("a, button, summary"))) {
      event.preventDefault();
      bound[1](event);
    }
  });
}

// After `pause` ms without another call.
export function later(action, pause) {
  let timer = 0;
  return (...words) => { clearTimeout(timer); timer = setTimeout(() => action(...words), pause); };
}
