/** Tokens in the text: each shaded by how surprised the model was, one of them open, and where it looked. */

import { el, percent, visible } from "./dom.js";
import { t } from "./i18n.js";
import { groups, surpriseStep } from "./seethrough.js";
import { state, tell } from "./state.js";

const STEPS = 5;
/** Token element -> the explanation's leaf and the numbers of its tokens. */
const places = new WeakMap();

/** Elements for pieces that have just come, shaded by what the stream says of their chance. */
export function livePieces(pieces) {
  return pieces.map(({ text, chance }) => el(`span.token.live.s${surpriseStep(chance)}`, {}, ...inked(text)));
}

/** A token's blanks, which stay clear, and its ink, which is shaded: a blank at the end of a line would be a stray mark. */
function inked(text) {
  const [, blanks, ink] = /^(\s*)([\s\S]*)$/.exec(text);
  return [blanks, ink ? el("span.ink", {}, ink) : null];
}

/** Elements for the tokens of a message. */
export function tokenSpans(pieces, found, leaf) {
  return groups(pieces).map(({ indices, text }) => {
    const chances = indices.map((index) => found.tokens[index].probability);
    const chance = chances.includes(null) ? null : chances.reduce((product, one) => product * one, 1);
    const span = el(`span.token.s${surpriseStep(chance)}`, {}, ...inked(text));
    const open = isOpen(leaf, indices);
    if (open) span.classList.add("open");
    span.tabIndex = open ? 0 : -1;
    places.set(span, { leaf, indices, chance, text });
    return span;
  });
}

const isOpen = (leaf, indices) => state.open?.leaf === leaf && indices.includes(state.open.index);

/** All token elements on the page that can be opened, in order. */
const all = () => [...document.querySelectorAll("#transcript .token:not(.live)")];

/** Open a token: the panel shows it. */
export function openToken(leaf, index) {
  state.open = { leaf, index };
  markOpen();
  tell("open");
}

/** Show which token is open, and let the keyboard in: one token can be reached with Tab, arrows do the rest. */
export function markOpen() {
  let reachable = null;
  for (const span of all()) {
    const { leaf, indices, chance, text } = places.get(span);
    const open = isOpen(leaf, indices);
    span.classList.toggle("open", open);
    span.tabIndex = -1;
    if (open || !reachable) reachable = span;
    if (open) {
      span.setAttribute("role", "button");
      span.setAttribute("aria-label", t("tokenLabel", { word: visible(text), chance: percent(chance) }));
    } else {
      span.removeAttribute("role");
      span.removeAttribute("aria-label");
    }
  }
  if (reachable) reachable.tabIndex = 0;
}

/** The element of the open token. */
export const openSpan = () => document.querySelector("#transcript .token.open");

/** Shade the text by where the model looked, or, with null, by surprise again. */
export function paintAttention(weights) {
  const transcript = document.getElementById("transcript");
  transcript.classList.toggle("looking", weights !== null);
  for (const span of all()) {
    span.classList.remove(...[...span.classList].filter((name) => /^a\d$/.test(name)));
    if (weights === null) continue;
    const { leaf, indices } = places.get(span);
    if (leaf !== state.open?.leaf) continue;
    // The first mark often takes most of it; the scale is that of the others, or nothing else would be seen.
    const most = Math.max(1e-6, ...weights.slice(1));
    const weight = indices.reduce((sum, index) => sum + (weights[index] ?? 0), 0);
    span.classList.add(`a${Math.min(STEPS, Math.round((weight / most) * STEPS))}`);
  }
}

/** Move to another token, from the open one or from the one with the focus. */
export function step(by) {
  const spans = all();
  if (!spans.length) return;
  const current = openSpan() ?? (document.activeElement?.classList.contains("token") ? document.activeElement : null);
  if (!current) return openAt(spans.at(by > 0 ? 0 : -1), by);
  const { leaf, indices } = places.get(current);
  const inside = state.open && state.open.leaf === leaf ? indices.indexOf(state.open.index) + by : -1;
  if (state.open && inside >= 0 && inside < indices.length) openToken(leaf, indices[inside]);
  else openAt(spans[spans.indexOf(current) + by], by);
}

function openAt(span, by) {
  if (!span) return;
  const { leaf, indices } = places.get(span);
  openToken(leaf, by > 0 ? indices[0] : indices.at(-1));
  span.focus({ preventScroll: true });
  reveal(span);
}

/** Bring a token into view, clear of the sheet that a phone shows over the text. */
export function reveal(span) {
  const box = document.getElementById("transcript");
  const panel = document.getElementById("panel").getBoundingClientRect();
  const place = span.getBoundingClientRect();
  const sheet = panel.width >= window.innerWidth - 1 && panel.height ? panel.top : Infinity;
  const bottom = Math.min(box.getBoundingClientRect().bottom, sheet) - 40;
  const top = box.getBoundingClientRect().top + 20;
  if (place.bottom > bottom) box.scrollTop += place.bottom - bottom + 40;
  else if (place.top < top) box.scrollTop -= top - place.top + 40;
}

/** Let clicks and keys open tokens. */
export function listenForTokens(transcript) {
  transcript.addEventListener("click", (event) => {
    const span = event.target.closest?.(".token:not(.live)");
    if (!span || !document.getSelection().isCollapsed) return;
    const { leaf, indices } = places.get(span);
    openToken(leaf, indices.at(-1));
    span.focus({ preventScroll: true });
    requestAnimationFrame(() => reveal(span));
  });
  transcript.addEventListener("keydown", (event) => {
    if (!event.target.classList?.contains("token")) return;
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) {
      event.preventDefault();
      step(by);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      const { leaf, indices } = places.get(event.target);
      if (!isOpen(leaf, indices)) openToken(leaf, indices.at(-1));
      document.querySelector("#panel [role=tab][aria-selected=true]")?.focus();
    }
  });
}
