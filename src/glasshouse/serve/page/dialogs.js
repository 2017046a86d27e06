/** The dialogs: how words are chosen, export and import, keys, help, questions. One at a time, in one element. */

import { useKey } from "./api.js";
import { download, el, iconButton } from "./dom.js";
import { t } from "./i18n.js";
import { DEFAULTS, setSampling, state, tell } from "./state.js";
import { allConversations, exportText, importText, preferenceLines, save, trainingLines } from "./store.js";
import { preferences } from "./tree.js";

const dialog = document.getElementById("dialog");
const NUMBERS = {
  temperature: [0, 2, 0.05], top_p: [0.05, 1, 0.05], top_k: [0, 200, 1], min_p: [0, 1, 0.01],
  repetition_penalty: [1, 2, 0.05], max_tokens: [1, 4000, 1],
};

function show(title, ...content) {
  dialog.replaceChildren(el("header", {}, el("h2", { id: "dialog-title" }, title),
    iconButton("close", t("close"), () => dialog.close())), ...content);
  dialog.setAttribute("aria-labelledby", "dialog-title");
  if (!dialog.open) dialog.showModal();
}

dialog.addEventListener("close", () => dialog.replaceChildren()); // a key, above all, does not stay there
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close(); // a click beside it
});

// ---- how words are chosen

/** The sampling panel. */
export function showSampling() {
  const fields = Object.entries(NUMBERS).map(([name, [low, high, step]]) => numberField(name, low, high, step));
  const seed = el("input", { id: "field-seed", type: "number", min: "0", step: "1", value: state.sampling.seed });
  seed.addEventListener("change", () => setSampling({ seed: seed.value }));
  const stops = el("textarea", { id: "field-stops", rows: "2" });
  stops.value = state.sampling.stops;
  stops.addEventListener("change", () => setSampling({ stops: stops.value }));
  const rest = [labelled("seed", seed), labelled("stops", stops)];
  if (state.conversation.mode === "chat") rest.push(labelled("system", systemField()));
  show(t("sampling"), el("div.fields", {}, ...fields, ...rest), el("footer", {},
    el("button", { type: "button", onclick: () => {
      setSampling(DEFAULTS);
      showSampling();
    } }, t("reset")),
    el("button.primary", { type: "button", onclick: () => dialog.close() }, t("done"))));
}

function numberField(name, low, high, step) {
  const range = el("input", { type: "range", min: low, max: high, step, "aria-hidden": "true", tabindex: "-1" });
  const number = el("input", { id: `field-${name}`, type: "number", min: low, max: high, step });
  range.value = number.value = state.sampling[name];
  const set = (from) => () => {
    const value = Math.min(high, Math.max(low, Number(from.value)));
    if (from.value === "" || Number.isNaN(value)) return;
    setSampling({ [name]: value });
    range.value = value;
    if (from === range) number.value = value;
  };
  range.addEventListener("input", set(range));
  number.addEventListener("input", set(number));
  number.addEventListener("change", () => (number.value = state.sampling[name]));
  return labelled(name, number, range);
}

function labelled(name, field, beside = null) {
  const why = `why-${name}`;
  field.setAttribute("aria-describedby", why);
  return el("div.field", {}, el("label", { for: field.id }, t(name)), el("div.row", {}, beside, field), el("p.quiet", { id: why }, t(`${name}Why`)));
}

function systemField() {
  const area = el("textarea", { id: "field-system", rows: "3" });
  area.value = state.conversation.system ?? "";
  area.addEventListener("change", () => {
    state.conversation.system = area.value || undefined;
    if (state.conversations.includes(state.conversation)) save(state.conversation);
  });
  return area;
}

// ---- files

/** Export and import. */
export async function showData() {
  const conversations = await allConversations();
  const pairs = conversations.flatMap(preferences).length;
  const day = new Date().toISOString().slice(0, 10);
  const file = (name, words, make, type, enabled = true) => el("button.wide", {
    type: "button", id: `export-${name}`, disabled: !enabled || !conversations.length,
    onclick: () => download(`glasshouse-${name}-${day}.${type.includes("jsonl") ? "jsonl" : "json"}`, make(conversations), type),
  }, words);
  const outcome = el("p.quiet", { role: "status" });
  const input = el("input", { type: "file", id: "import-file", accept: ".json,application/json", class: "hidden", onchange: async () => {
    try {
      const count = await importText(await input.files[0].text());
      outcome.textContent = t("imported", { count });
      tell("list");
    } catch {
      outcome.textContent = t("importFailed");
    }
    input.value = "";
  } });
  show(t("data"), el("p.quiet", {}, t("dataWhy")), el("div.stack", {},
    file("conversations", t("exportAll"), exportText, "application/json"),
    file("training", t("exportLines"), trainingLines, "application/jsonl"),
    file("preferences", t("exportPairs", { count: pairs }), preferenceLines, "application/jsonl", pairs > 0)),
  el("p.quiet", {}, t("pairsWhy")),
  el("div.stack", {}, el("button.wide", { type: "button", onclick: () => input.click() }, t("import")), input), outcome);
}

// ---- help, key, question

/** The keyboard's list. */
export function showHelp() {
  const keys = [
    [["Enter"], "keySend"], [["Shift", "Enter"], "keyLine"], [["Esc"], "keyStop"], [["/"], "keyFocus"], [["n"], "keyNew"],
    [["s"], "keySee"], [["r"], "keyAgain"], [["←", "→"], "keyWords"], [["Enter", "Esc"], "keyInto"], [["?"], "keyHelp"],
  ];
  show(t("helpTitle"), el("dl.keys", {}, ...keys.flatMap(([names, words]) => [
    el("dt", {}, ...names.flatMap((name) => [el("kbd", {}, name), " "])), el("dd", {}, t(words)),
  ])), el("p.quiet", {}, t("chancesWhy")), el("p.quiet", {}, t("layersWhy")), el("p.quiet", {}, t("attentionWhy")));
}

/** Ask for the server's key. */
export function askForKey(wrong, then) {
  const input = el("input", { id: "field-key", type: "password", autocomplete: "off", required: true });
  const send = (event) => {
    event.preventDefault();
    useKey(input.value.trim());
    dialog.close();
    then();
  };
  show(t("keyTitle"), el("p.quiet", {}, t("keyWhy")), el("form.stack", { onsubmit: send },
    el("label", { for: "field-key" }, t("key")), input,
    wrong ? el("p.trouble", { role: "alert" }, t("keyWrong")) : null,
    el("button.primary", { type: "submit" }, t("use"))));
  input.focus();
}

/** Ask before something that cannot be undone. */
export function confirmRemoval(title, then) {
  show(t("remove"), el("p", {}, t("removeSure", { title })), el("footer", {},
    el("button", { type: "button", onclick: () => dialog.close() }, t("cancel")),
    el("button.primary", { type: "button", onclick: () => {
      dialog.close();
      then();
    } }, t("remove"))));
}
