/** The page put together: what is where, which key does what, and what is drawn when something changes. */

import { models } from "./api.js";
import { progress, renderTranscript, whyOf } from "./chat.js";
import { askForKey, confirmRemoval, showData, showHelp, showSampling } from "./dialogs.js";
import { el, icon, iconButton } from "./dom.js";
import { otherName, switchLanguage, t, translatePage } from "./i18n.js";
import { closePanel, isOpenHere, renderPanel } from "./panel.js";
import { explanation, requestExplanation } from "./seethrough.js";
import { modelNamed, on, state, tell } from "./state.js";
import { allConversations, openStore, recall, remember, remove, save } from "./store.js";
import { listenForTokens, markOpen } from "./tokens.js";
import { partner, path } from "./tree.js";
import { again, begin, goOn, isWriting, lastNode, say, stopAll } from "./writer.js";

const byId = (id) => document.getElementById(id);
const [transcript, composer, area] = ["transcript", "composer", "composer-text"].map(byId);
let triedKey = false;

// ---- drawing

function renderAll() {
  if (!isOpenHere()) state.open = null;
  renderTranscript();
  renderComposer();
  renderList();
  renderLegend();
  renderPanel();
  markOpen();
  explainWhatIsSeen();
}

/** In see-through mode the text on the page is explained as soon as it stands still. */
function explainWhatIsSeen() {
  if (!state.see || !state.conversation) return;
  const last = path(state.conversation).findLast((node) => node.role === "assistant" && node.text);
  for (const node of [last, last && partner(state.conversation, last)]) {
    if (node && !explanation(node)) requestExplanation(state.conversation, node);
  }
}

function renderComposer() {
  const { conversation } = state;
  const writing = isWriting();
  const model = modelNamed(state.model);
  const chat = conversation.mode === "chat";
  const begun = path(conversation).length > 0;
  for (const mode of ["chat", "text"]) {
    const button = byId(`mode-${mode}`);
    button.setAttribute("aria-checked", String(conversation.mode === mode));
    button.tabIndex = conversation.mode === mode ? 0 : -1;
    button.disabled = (begun && conversation.mode !== mode) || (mode === "chat" && model?.chat === false);
  }
  byId("why").textContent = whyOf(conversation);
  area.placeholder = t(chat ? "askPlaceholder" : begun ? "morePlaceholder" : "textPlaceholder");
  byId("composer-label").textContent = area.placeholder;
  byId("stop").hidden = !writing;
  byId("send").hidden = writing;
  renderSend();
  byId("see").setAttribute("aria-pressed", String(state.see));
}

function renderSend() {
  const canGoOn = state.conversation.mode === "text" && lastNode(state.conversation)?.role === "assistant";
  const send = byId("send");
  send.disabled = !state.models.length || (!area.value && !canGoOn);
  const words = t(!area.value && canGoOn ? "goOn" : "send");
  send.setAttribute("aria-label", words);
  send.title = words;
  area.rows = 1; // grow with the text, up to the height the style allows
  area.style.blockSize = "auto";
  area.style.blockSize = `${area.scrollHeight}px`;
}

function renderList() {
  byId("conversations").replaceChildren(...state.conversations.map((conversation) => el("li", {
    "aria-current": conversation === state.conversation ? "true" : null,
  },
  el("button", { type: "button", onclick: () => openConversation(conversation), dir: "auto" }, conversation.title || t("untitled")),
  iconButton("trash", t("remove"), () => confirmRemoval(conversation.title || t("untitled"), async () => {
    await remove(conversation.id);
    state.conversations = state.conversations.filter((other) => other !== conversation);
    if (state.conversation === conversation) begin();
    else renderList();
  })))));
}

function openConversation(conversation) {
  state.conversation = conversation;
  state.open = null;
  showSidebar(false);
  tell("conversation");
  transcript.scrollTop = transcript.scrollHeight;
}

function renderModels() {
  const options = () => state.models.map((model) => el("option", { value: model.id }, model.id));
  byId("model").replaceChildren(...options());
  byId("model").value = state.model;
  byId("second").replaceChildren(el("option", { value: "" }, t("noSecond")), ...options());
  byId("second").value = state.second;
  byId("second-label").hidden = state.models.length < 2;
}

/** What the colours mean: surprise, or, while attention is open, where the model looked. */
function renderLegend() {
  const legend = byId("legend");
  legend.hidden = !state.see || !path(state.conversation).length;
  const looking = state.open && state.tab === "attention";
  const scale = (letter) => Array.from({ length: 6 }, (_, step) => el(`span.swatch.token.live.${letter}${step}`, { "aria-hidden": "true" }));
  legend.classList.toggle("looking", Boolean(looking));
  legend.replaceChildren(
    el("span.scale", {}, t(looking ? "legendLittle" : "legendSure"), el("span.swatches", {}, ...scale(looking ? "a" : "s")), t(looking ? "legendLooked" : "legendSurprised")),
    state.open ? "" : el("span.hint", {}, t("legendHint")));
}

function notice(words, retry = null) {
  const place = byId("notice");
  place.hidden = !words;
  place.replaceChildren(...(words ? [words, " ", retry ? el("button", { type: "button", onclick: retry }, t("retry")) : "",
    iconButton("close", t("close"), () => notice(""))] : []));
}

/** Say what went wrong; a missing key is asked for. */
function explainProblem(error, retry = null) {
  if (error.kind === "key") return askForKey(triedKey, () => {
    triedKey = true;
    (retry ?? loadModels)();
  });
  const words = { unreachable: t("unreachable"), busy: t("busy"), died: t("died") }[error.kind];
  return notice(words ?? t("failed", { message: error.message }), retry);
}

// ---- what happens

on("conversation", renderAll);
on("open", () => {
  renderPanel();
  renderLegend();
});
on("explained", () => {
  renderTranscript();
  renderPanel();
  markOpen();
});
on("progress", progress);
on("list", async () => {
  const kept = new Map(state.conversations.map((conversation) => [conversation.id, conversation]));
  state.conversations = (await allConversations()).map((conversation) => kept.get(conversation.id) ?? conversation);
  renderList();
});
on("finished", (node) => {
  if (!(node.id in state.conversation.nodes)) return;
  renderAll();
  byId("live").textContent = node.error ? "" : t("answerDone", { text: node.text });
});
on("problem", (error) => {
  if (error.kind === "key") explainProblem(error, () => loadModels());
  else if (state.see && !isWriting() && error.kind !== "died") notice(t("explainFailed", { message: error.message || t("unreachable") }), explainAgain);
});

function explainAgain() {
  notice("");
  explainWhatIsSeen();
}

function send(event) {
  event?.preventDefault();
  if (isWriting() || byId("send").disabled) return;
  const text = area.value;
  area.value = "";
  notice("");
  if (text) say(text);
  else goOn(lastNode(state.conversation));
  transcript.scrollTop = transcript.scrollHeight;
}

function toggleSee() {
  state.see = !state.see;
  remember("see", state.see);
  if (!state.see) state.open = null;
  renderAll();
}

function chooseMode(mode) {
  state.conversation.mode = mode;
  renderAll();
  byId(`mode-${mode}`).focus();
}

function showSidebar(shown) {
  const wasShown = document.body.classList.contains("sidebar-open");
  document.body.classList.toggle("sidebar-open", shown);
  byId("shade").hidden = !shown;
  if (shown) byId("new").focus();
  else if (wasShown) byId("open-sidebar").focus();
}

function applyTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  const dark = (theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  byId("theme").replaceChildren(icon(dark ? "sun" : "moon"));
  return dark ? "dark" : "light";
}

function translate() {
  translatePage();
  byId("language").textContent = otherName();
  byId("language").setAttribute("lang", otherName() === "中文" ? "zh" : "en");
  renderModels();
  renderAll();
}

// ---- keys

const SHORTCUTS = {
  "/": () => area.focus(),
  n: () => newConversation(),
  s: () => toggleSee(),
  r: () => {
    const last = lastNode(state.conversation);
    if (last?.role === "assistant" && !isWriting()) again(last);
  },
  "?": () => showHelp(),
};

function onKey(event) {
  if (byId("dialog").open || event.isComposing) return;
  if (event.key === "Escape") {
    if (document.body.classList.contains("sidebar-open")) showSidebar(false);
    else if (isWriting()) stopAll();
    else if (state.open) closePanel();
    return;
  }
  const typing = /^(TEXTAREA|INPUT|SELECT)$/.test(event.target.tagName);
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(SHORTCUTS, event.key)) return;
  event.preventDefault();
  SHORTCUTS[event.key]();
}

function newConversation() {
  showSidebar(false);
  begin();
  area.focus();
}

// ---- beginning

async function loadModels() {
  try {
    state.models = await models();
    notice(state.models.length ? "" : t("noModels"), loadModels);
  } catch (error) {
    explainProblem(error, loadModels);
  }
  if (!modelNamed(state.model)) state.model = state.models[0]?.id ?? "";
  renderModels();
  if (!path(state.conversation).length) begin();
  else renderAll();
}

function wire() {
  for (const button of document.querySelectorAll("[data-icon]")) button.prepend(icon(button.dataset.icon));
  const clicks = {
    new: newConversation, data: showData, help: showHelp, see: toggleSee, sampling: showSampling, stop: stopAll,
    "open-sidebar": () => showSidebar(true), "close-sidebar": () => showSidebar(false), shade: () => showSidebar(false),
    "mode-chat": () => chooseMode("chat"), "mode-text": () => chooseMode("text"),
    theme: () => remember("theme", applyTheme(applyTheme(recall("theme", null)) === "dark" ? "light" : "dark")),
    language: () => {
      switchLanguage();
      translate();
    },
  };
  for (const [id, action] of Object.entries(clicks)) byId(id).addEventListener("click", action);
  byId("model").addEventListener("change", (event) => {
    state.model = event.target.value;
    remember("model", state.model);
    if (path(state.conversation).length) renderAll();
    else begin();
  });
  byId("second").addEventListener("change", (event) => (state.second = event.target.value));
  composer.addEventListener("submit", send);
  area.addEventListener("input", renderSend);
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  });
  document.querySelector(".modes").addEventListener("keydown", (event) => {
    const other = state.conversation.mode === "chat" ? "text" : "chat";
    if (event.key.startsWith("Arrow") && !byId(`mode-${other}`).disabled) chooseMode(other);
  });
  document.addEventListener("keydown", onKey);
  window.addEventListener("pagehide", () => isWriting() && save(state.conversation));
  listenForTokens(transcript);
}

async function start() {
  applyTheme(recall("theme", null));
  wire();
  begin();
  translate();
  if (!(await openStore())) notice(t("noKeeping"));
  state.conversations = await allConversations();
  renderList();
  await loadModels();
}

start();
