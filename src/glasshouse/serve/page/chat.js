/**
 * The conversation on the page: turns, versions, editing, thumbs. Shows what the state says; what a model wrote is
 * handed to markdown.js or becomes text.
 */

import { el, iconButton } from "./dom.js";
import { t } from "./i18n.js";
import { renderMarkdown } from "./markdown.js";
import { modelNamed, state, tell } from "./state.js";
import { save } from "./store.js";
import { explanation, locate } from "./seethrough.js";
import { livePieces, tokenSpans } from "./tokens.js";
import { addNode, choose, partner, path, versions } from "./tree.js";
import { again, answer, goOn, lastNode, retry } from "./writer.js";
import { welcome } from "./welcome.js";

const transcript = document.getElementById("transcript");
/** Node id -> the element that shows its text, and how much of a stream it shows already. */
const bodies = new Map();
const streamed = new WeakMap();
let editing = null;
let due = new Set();

/** Draw the whole conversation; keeps the keyboard focus where it was. */
export function renderTranscript() {
  const focused = document.activeElement?.dataset?.key;
  const nodes = state.conversation ? path(state.conversation) : [];
  bodies.clear();
  transcript.dataset.mode = state.conversation?.mode ?? "text";
  transcript.classList.toggle("see", state.see);
  const turns = state.conversation?.mode === "chat" ? nodes.flatMap(chatTurn) : passages(nodes);
  transcript.replaceChildren(el("div.column", {}, ...(turns.length ? turns : [welcome()])));
  if (focused) [...transcript.querySelectorAll("[data-key]")].find((item) => item.dataset.key === focused)?.focus();
}

/** Show what came for a node; at most once for each picture the screen shows. */
export function progress(node) {
  if (!due.size) requestAnimationFrame(showProgress);
  due.add(node);
}

function showProgress() {
  const near = transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight < 120;
  for (const node of due) {
    const body = bodies.get(node.id);
    if (body) fill(body, node);
    const status = body?.closest("article, .answer")?.querySelector(`[data-status="${CSS.escape(node.id)}"]`);
    if (status && node.rate) status.textContent = t("rate", { rate: node.rate.toFixed(node.rate < 10 ? 1 : 0) });
  }
  due = new Set();
  if (near) transcript.scrollTop = transcript.scrollHeight;
}

// ---- turns

/** A message of a chat; the two answers of a pair stand side by side while they are the last. */
function chatTurn(node) {
  if (node.role === "user") {
    const parts = editing === node.id ? [editor(node)] : [body("div.body", node), tools(node)];
    return [el("article.turn.mine", {}, el("h2.hidden", {}, t("you")), ...parts)];
  }
  return [el("article.turn", {}, ...answers(node))];
}

/** Free text: what was written by hand and what the model went on with, in one flow. */
function passages(nodes) {
  const found = [];
  for (const node of nodes) {
    if (node.role === "user" || !found.length) found.push({ mine: null, theirs: [] });
    if (node.role === "user") found.at(-1).mine = node;
    else found.at(-1).theirs.push(node);
  }
  return found.map(({ mine, theirs }) => {
    if (mine && editing === mine.id) return el("article.passage", {}, editor(mine));
    const last = theirs.at(-1);
    const other = last && isLast(last) ? partner(state.conversation, last) : null;
    const words = mine ? body("span.by-you", mine) : null;
    if (other) return el("article.passage", {}, el("h2.hidden", {}, t("text")), el("p.flow", {}, words), ...answers(last));
    return el("article.passage", {}, el("h2.hidden", {}, t("text")),
      el("p.flow", {}, words, ...theirs.map((node) => body("span.by-model", node))),
      ...(last ? [trouble(last), tools(last, mine)] : [mine ? tools(mine) : null]));
  });
}

const isLast = (node) => lastNode(state.conversation) === node;

function answers(node) {
  const other = isLast(node) ? partner(state.conversation, node) : null;
  if (!other) return one(node);
  const both = versions(state.conversation, node).filter((version) => version === node || version === other);
  return [el("div.pair", {}, ...both.map((version) => el("section.answer", { "aria-label": version.model },
    el("p.by", {}, version.model), ...one(version, true))))];
}

function one(node, inPair = false) {
  if (editing === node.id) return [editor(node)];
  const kind = state.conversation.mode === "chat" ? "div.body" : "p.flow.body";
  return [el("h2.hidden", {}, `${t("answer")}: ${node.model ?? ""}`), body(kind, node), trouble(node), tools(node, null, inPair)];
}

function body(tag, node) {
  const element = el(tag, { "data-node": node.id, dir: "auto" });
  bodies.set(node.id, element);
  fill(element, node);
  return element;
}

/** Put a node's text into its element: tokens in see-through mode, otherwise words. */
function fill(element, node) {
  const writing = state.writing.get(node.id);
  if (state.see && writing) return showLive(element, writing);
  const located = state.see && tokensOf(node);
  if (located) return element.replaceChildren(...tokenSpans(located.pieces, located.found, located.leaf));
  if (state.conversation.mode === "chat" && node.role === "assistant") return renderMarkdown(element, node.text || (writing ? "…" : ""));
  element.textContent = node.text;
  if (writing) element.append(el("span.cursor", { "aria-hidden": "true" }));
  return undefined;
}

/** Append what came since the last time. */
function showLive(element, writing) {
  if (streamed.get(element) === undefined) element.replaceChildren();
  const from = streamed.get(element) ?? 0;
  element.append(...livePieces(writing.pieces.slice(from)));
  streamed.set(element, writing.pieces.length);
}

/** The tokens of a message, from the explanation of the latest text on the path that has one. */
function tokensOf(node) {
  const other = partner(state.conversation, node);
  const line = path(state.conversation);
  const nodes = line.includes(node) ? line : other && line.includes(other) ? [...line.slice(0, line.indexOf(other)), node] : [];
  for (let end = nodes.length; end > nodes.indexOf(node); end -= 1) {
    const found = explanation(nodes[end - 1]);
    const pieces = found && locate(found, nodes.slice(0, end)).get(node.id);
    if (pieces) return { pieces, found, leaf: nodes[end - 1] };
  }
  return null;
}

// ---- below a turn

function trouble(node) {
  if (!node.error) return null;
  const words = { died: t("died"), unreachable: t("unreachable"), busy: t("busy"), key: t("keyTitle") }[node.error];
  const partial = node.text && (node.ids?.length || state.conversation.mode === "text");
  return el("p.trouble", { role: "alert" }, words ?? t("failed", { message: node.reason ?? "" }), " ",
    el("button", { type: "button", onclick: () => (partial ? goOn(node) : retry(node)) }, partial ? t("goOn") : t("retry")));
}

function tools(node, mine = null, inPair = false) {
  const writing = state.writing.has(node.id);
  const key = (name) => ({ "data-key": `${node.id}:${name}` });
  const list = [];
  if (mine) list.push(...switcher(mine));
  list.push(...(inPair ? [] : switcher(node)));
  if (!writing) {
    const edited = mine ?? node;
    list.push(iconButton("edit", t("edit"), () => startEdit(edited), key("edit")));
    if (node.role === "assistant" && !inPair) list.push(iconButton("again", t("again"), () => again(node), key("again")));
    list.push(iconButton("copy", t("copy"), (event) => copy(mine ? mine.text + node.text : node.text, event.currentTarget), key("copy")));
    if (node.role === "assistant") list.push(...thumbs(node, inPair));
  }
  return el("div.tools", { role: "group" }, ...list, node.role === "assistant" ? status(node, writing, inPair) : null);
}

function status(node, writing, inPair) {
  const facts = [];
  if (!writing && node.finish === "stopped") facts.push(t("stopped"));
  if (!writing && node.finish === "length") facts.push(t("cut"));
  const ended = !writing && !node.error && ["stopped", "length"].includes(node.finish) && isLast(node) && state.conversation.mode === "chat";
  return el("span.status", {},
    el("span", {}, facts.join(" ")),
    ended ? el("button.link", { type: "button", onclick: () => goOn(node) }, t("goOn")) : null,
    el("span", { "data-status": node.id }, writing && !node.rate ? t("writing") : node.rate ? t("rate", { rate: node.rate.toFixed(node.rate < 10 ? 1 : 0) }) : ""),
    state.models.length > 1 && node.model && !inPair ? el("span", {}, node.model) : null);
}

/** Arrows between the versions of a node. */
function switcher(node) {
  const all = versions(state.conversation, node);
  if (all.length < 2) return [];
  const place = all.indexOf(node);
  const go = (other) => () => {
    choose(state.conversation, other);
    state.open = null;
    save(state.conversation);
    tell("conversation");
  };
  return [el("span.versions", {},
    iconButton("left", t("earlier"), go(all[place - 1]), { disabled: place === 0, "data-key": `${node.parent}:earlier` }),
    el("span", { "aria-label": t("versionOf", { number: place + 1, count: all.length }), role: "img" }, `${place + 1}/${all.length}`),
    iconButton("right", t("later"), go(all[place + 1]), { disabled: place === all.length - 1, "data-key": `${node.parent}:later` }))];
}

function thumbs(node, inPair) {
  const rate = (rating) => () => {
    node.rating = node.rating === rating ? 0 : rating;
    const other = inPair && partner(state.conversation, node);
    if (other) { // to prefer one of a pair is to like it more than the other
      other.rating = -node.rating;
      choose(state.conversation, node.rating < 0 ? other : node);
    }
    save(state.conversation);
    tell("conversation");
  };
  const press = (rating) => ({ "aria-pressed": String(node.rating === rating), "data-key": `${node.id}:${rating}` });
  if (inPair) return [el("button.prefer", { type: "button", onclick: rate(1), ...press(1) }, node.rating === 1 ? t("preferred") : t("prefer"))];
  return [iconButton("up", t("good"), rate(1), press(1)), iconButton("down", t("bad"), rate(-1), press(-1))];
}

async function copy(text, button) {
  await navigator.clipboard?.writeText(text).catch(() => undefined);
  document.getElementById("live").textContent = t("copied");
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 900);
}

// ---- editing

function startEdit(node) {
  editing = node.id;
  renderTranscript();
  const area = transcript.querySelector(".editor textarea");
  area?.focus();
  area?.setSelectionRange(area.value.length, area.value.length);
}

function editor(node) {
  const area = el("textarea", { "aria-label": t("edit"), rows: Math.min(12, node.text.split("\n").length + 1) });
  area.value = node.text;
  const close = () => {
    editing = null;
    renderTranscript();
  };
  const keep = (event) => {
    event?.preventDefault();
    editing = null;
    const text = area.value;
    const same = text === node.text || !text;
    const version = same ? node : addNode(state.conversation, node.parent, node.role, { text, model: node.model });
    if (node.role === "user" && !same) return answer(version);
    save(state.conversation);
    return tell("conversation");
  };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && state.conversation.mode === "chat") keep(event);
  });
  return el("form.editor", { onsubmit: keep }, area, el("div.row", {},
    el("button.primary", { type: "submit" }, node.role === "user" ? t("saveEdit") : t("keepEdit")),
    el("button", { type: "button", onclick: close }, t("cancel"))));
}

/** Why a conversation is of its kind, where that needs saying. */
export function whyOf(conversation) {
  const model = modelNamed(state.model);
  if (!model || conversation?.mode !== "text") return "";
  return model.base ? t("whyText") : model.chat ? "" : t("noChat");
}
