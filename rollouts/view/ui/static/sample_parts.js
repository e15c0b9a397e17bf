// The parts of a sample's page: its numbers, the conversation, its group, its prompt through training.
import { el, number } from "./common.js";

export function head(sample, actions) {
  const facts = [["reward", number(sample.reward)], ["advantage", number(sample.advantage)], ["step", sample.step], ["group", sample.group], ["tokens", number(sample.length)], ["finish", sample.finish || "–"], ["weights of step", number(sample.weight_version)]];
  return el("div.detail-head", {}, el("button.quiet.back", { type: "button", onclick: actions.back }, "← list"),
    facts.map(([name, value]) => el("span.soft", {}, `${name} `, el("b.fact", {}, value))),
    el("span.actions", {}, sample.prompt_id ? el("button", { type: "button", onclick: actions.same }, "Same prompt") : "",
      el("button", { type: "button", onclick: actions.link }, "Copy link"), el("button", { type: "button", onclick: actions.copy }, "Copy", el("kbd", {}, "c"))));
}

export function turns(parts) {
  return parts.map((part) => {
    const kind = part.kind === "thinking" ? "thinking" : part.kind.startsWith("tool") ? "tool" : part.role.replace(/[^a-z]/g, "");
    const name = part.kind === "text" ? part.role : `${part.role}: ${part.kind}`;
    return el(`div.turn.${kind || "other"}`, {}, el("div.role", {}, name), el("pre", { tabindex: part.text.length > 3000 ? 0 : null }, part.text));
  });
}

export function group(sample, link, open) {
  const rewards = sample.siblings.map((one) => one.reward), low = Math.min(...rewards), high = Math.max(...rewards);
  return el("div.group", { tabindex: 0, role: "region", "aria-label": "Samples of the same group, side by side" }, sample.siblings.map((one) => {
    const fill = el("i");
    fill.style.width = `${high > low ? 100 * (one.reward - low) / (high - low) : 100}%`;
    return el("a", { href: link(one.offset), "aria-current": one.offset === sample.offset ? "true" : null, onclick: (event) => { event.preventDefault(); open(one.offset); } },
      el("span.soft", {}, "reward ", el("b.fact", {}, number(one.reward)), one.advantage === null ? "" : ` · advantage ${number(one.advantage)}`), el("div.meter", {}, fill), el("pre", {}, one.response || "(empty)"));
  }));
}

const SVG = "http://www.w3.org/2000/svg";
function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export function history(sample, link, open) {
  const points = sample.history;
  if (points.length < 2) return el("p.soft", {}, "This prompt was asked at this step alone.");
  const steps = points.map((point) => point.step), rewards = points.map((point) => point.reward);
  const [from, to, low, high] = [Math.min(...steps), Math.max(...steps), Math.min(...rewards), Math.max(...rewards)];
  const place = (point) => [8 + 984 * (point.step - from) / (to - from || 1), 66 - 58 * (point.reward - low) / (high - low || 1)];
  const line = svg("polyline", { class: "line", points: points.map((point) => place(point).join(",")).join(" "), "vector-effect": "non-scaling-stroke" });
  const dots = points.length > 300 ? [] : points.map((point) => {
    const [x, y] = place(point);
    const dot = svg("circle", { cx: x, cy: y, r: 4, ...(point.step === sample.step ? { class: "at" } : {}) }, svg("title", {}));
    dot.firstChild.textContent = `step ${point.step}: mean reward ${number(point.reward)} of ${point.samples}`;
    return dot;
  });
  const picture = svg("svg", { class: "history", viewBox: "0 0 1000 74", preserveAspectRatio: "none", role: "img", "aria-label": `mean reward of this prompt from step ${from} to ${to}: ${number(rewards[0])} to ${number(rewards.at(-1))}` }, line, ...dots);
  const at = points.findIndex((point) => point.step >= sample.step);
  const step = (point, words) => point ? el("a", { href: link(point.offset), onclick: (event) => { event.preventDefault(); open(point.offset); } }, `${words} step ${point.step}`) : "";
  return el("section", {}, el("h2", {}, `This prompt through training: ${points.length} steps`), el("div.card", {}, picture,
    el("p.soft", {}, `mean reward ${number(low)} to ${number(high)} · `, step(points[at - 1], "before:"), " ", step(points[at + 1], "after:"), " ", at === points.length - 1 ? "" : step(points.at(-1), "last:"))));
}

export function metadata(sample) {
  if (!sample.metadata.length) return "";
  return el("details", {}, el("summary", {}, "What else was recorded"), el("dl.facts", {}, sample.metadata.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]).flat()));
}
