// A response's tokens, coloured by a number of each.
import { el, number } from "./common.js";

const LOG_PROBS = [-0.05, -0.5, -1.5, -3]; // nats: above the first a token was sure, under the last a surprise
const DIFFERENCES = [0.01, 0.05, 0.2, 1]; // nats between sampler and trainer: under the first it is rounding

export function colourings(sample) {
  const tokens = sample.tokens, none = tokens.texts.length ? "" : "no tokens were recorded";
  return [
    { name: "plain", label: "plain" },
    { name: "log_prob", label: "log-prob", off: none || (tokens.log_probs.length ? "" : "the sampler's log-probs were not recorded") },
    { name: "difference", label: "|Δ| to the trainer", off: none || (tokens.trainer.length && tokens.log_probs.length ? "" : "the trainer's log-probs were not recorded") },
    { name: "advantage", label: "advantage", off: none || (sample.advantage === null ? "no advantage was recorded: a value head gives one to each token" : "") },
  ];
}

function logProbClass(value) {
  if (value === null || value === undefined) return "";
  return value > LOG_PROBS[0] ? "" : value > LOG_PROBS[1] ? "n0" : value > LOG_PROBS[2] ? "n1" : value > LOG_PROBS[3] ? "n2" : "n3";
}

function difference(tokens, at) {
  const trainer = tokens.trainer[at], sampler = tokens.log_probs[at];
  return typeof trainer === "number" && typeof sampler === "number" ? Math.abs(trainer - sampler) : null;
}

function differenceClass(value) {
  const bin = value === null ? 0 : DIFFERENCES.filter((least) => value >= least).length;
  return bin ? `n${bin - 1}` : "";
}

function advantageClass(value) {
  const size = Math.abs(value), bin = size < 0.05 ? 0 : size < 0.5 ? 1 : size < 1.2 ? 2 : 3;
  return value === 0 ? "" : `${value > 0 ? "p" : "n"}${bin}`;
}

const key = (name) => el(`i.${name}`);

function legend(colouring, tokens) {
  const untrained = tokens.trained.length && tokens.trained.includes(false) ? [" ", el("span.tokens", {}, el("span.untrained", {}, "dimmed")), " is not trained on"] : "";
  const words = { plain: [], log_prob: ["log-prob under −0.05", key("n0"), "−0.5", key("n1"), "−1.5", key("n2"), "−3", key("n3"), "a surprise"], difference: ["|Δ| of 0.01", key("n0"), "0.05", key("n1"), "0.2", key("n2"), "1", key("n3"), "nats and more: sampler and trainer disagree"], advantage: ["pushed down", key("n3"), key("n1"), "·", key("p1"), key("p3"), "pushed up"] }[colouring];
  return el("div.legend", {}, words, untrained);
}

export function responseTokens(sample, colouring) {
  const tokens = sample.tokens;
  if (!tokens.texts.length) return [el("p.soft", {}, "No tokens were recorded of this sample.")];
  const spans = tokens.texts.map((text, at) => {
    const trained = tokens.trained.length ? tokens.trained[at] : true;
    const tone = colouring === "log_prob" ? logProbClass(tokens.log_probs[at]) : colouring === "difference" ? differenceClass(difference(tokens, at)) : colouring === "advantage" && trained ? advantageClass(sample.advantage) : "";
    const span = el(`span${tone ? `.${tone}` : ""}${trained ? "" : ".untrained"}`, {}, text);
    const apart = difference(tokens, at);
    if (tokens.log_probs.length) span.title = `log-prob ${number(tokens.log_probs[at])}${apart === null ? "" : `, the trainer's ${number(tokens.trainer[at])}, |Δ| ${number(apart)}`}${trained ? "" : ", not trained on"}`;
    return span;
  });
  const notes = [];
  if (!tokens.decoded) notes.push("No tokenizer of this run lies here (it comes with a checkpoint): tokens are shown by their ids.");
  if (tokens.left) notes.push(`${number(tokens.left)} more tokens are left out.`);
  return [el(`div.response.tokens${tokens.decoded ? "" : ".ids"}`, {}, spans), legend(colouring, tokens), ...notes.map((note) => el("p.soft", {}, note))];
}
