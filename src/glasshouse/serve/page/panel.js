/** The panel beside the text: one token from the inside. Chances, layers, attention, and the surprise along the text. */

import { bar, el, iconButton, percent, svg, visible, word } from "./dom.js";
import { t } from "./i18n.js";
import { bits, details, explanation, groups, locate, weights } from "./seethrough.js";
import { state, tell } from "./state.js";
import { openSpan, openToken, paintAttention, step } from "./tokens.js";
import { before, path } from "./tree.js";
import { branch } from "./writer.js";

const panel = document.getElementById("panel");
const TABS = ["chances", "layers", "attention"];
const MOST_LOOKED = 6;
const MOST_ON_MAP = 16; // layers or heads; more would be too small to point at
const WAIT = 120; // milliseconds before saying that something takes a while

/** Draw the panel for the open token, or close it. */
export function renderPanel() {
  const found = state.open && explanation(state.open.leaf);
  const shown = Boolean(found && state.see);
  panel.hidden = !shown;
  document.body.classList.toggle("panel-open", shown);
  if (!shown) {
    paintAttention(null);
    return panel.replaceChildren();
  }
  const focused = panel.contains(document.activeElement) ? document.activeElement.id : null;
  const view = el("div.view", { role: "tabpanel", id: "view", "aria-labelledby": `tab-${state.tab}`, tabindex: "-1" });
  panel.replaceChildren(header(found), sparkline(found), tabs(), view);
  if (state.tab !== "attention") paintAttention(null);
  ({ chances, layers, attention })[state.tab](view, found, state.open.index);
  if (focused) document.getElementById(focused)?.focus();
  return undefined;
}

/** Close the panel; the keyboard goes back to the text. */
export function closePanel() {
  const span = openSpan();
  state.open = null;
  renderPanel();
  span?.classList.remove("open");
  span?.focus();
}

function header(found) {
  const token = found.tokens[state.open.index];
  const chance = token.probability === null ? null : token.rank === 1 ? t("chanceFirst", { chance: percent(token.probability) })
    : t("chanceOf", { chance: percent(token.probability), rank: token.rank });
  return el("header", {},
    el("div.word", {}, el("h2", { dir: "auto" }, word(token.text || "\ufffd")), el("p", {}, [chance, partOf(found)].filter(Boolean).join(". "))),
    el("div.row", {},
      iconButton("left", t("previousWord"), () => step(-1), { id: "panel-previous" }),
      iconButton("right", t("nextWord"), () => step(1), { id: "panel-next" }),
      iconButton("close", t("close"), closePanel, { id: "panel-close" })));
}

/** Which part of a character the open token is, where one takes several. */
function partOf(found) {
  const { index } = state.open;
  const pieces = [...locate(found, lineTo(state.open.leaf)).values()].find((list) => list.some((piece) => piece.index === index)) ?? [];
  const indices = groups(pieces).find((group) => group.indices.includes(index))?.indices ?? [];
  return indices.length > 1 ? t("part", { number: indices.indexOf(index) + 1, count: indices.length }) : "";
}

function tabs() {
  const choose = (name) => () => {
    state.tab = name;
    tell("open");
    document.getElementById(`tab-${name}`).focus();
  };
  const move = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) choose(TABS[(TABS.indexOf(state.tab) + by + TABS.length) % TABS.length])();
  };
  return el("div.tabs", { role: "tablist", onkeydown: move }, ...TABS.map((name) => el("button", {
    type: "button", role: "tab", id: `tab-${name}`, "aria-selected": String(state.tab === name), "aria-controls": "view",
    tabindex: state.tab === name ? "0" : "-1", onclick: choose(name),
  }, t(`tab${name[0].toUpperCase()}${name.slice(1)}`))));
}

// ---- chances

function chances(view, found, index) {
  const token = found.tokens[index];
  view.append(el("p.why", {}, t("chancesWhy")));
  if (token.probability === null) return view.append(el("p.note", {}, t("noChance")));
  const owner = ownerOf(found, index);
  const others = token.alternatives.filter((other) => other.id !== token.id);
  const own = { id: token.id, text: token.text || "\ufffd", probability: token.probability };
  const rows = [own, ...others].sort((one, other) => other.probability - one.probability);
  const most = Math.max(...rows.map((row) => row.probability));
  view.append(el("ol.bars", {}, ...rows.map((row) => el("li", {}, choice(row, row === own, most, owner, found, index)))));
  const rest = 1 - rows.reduce((sum, row) => sum + row.probability, 0);
  if (rest > 0.0005) view.append(el("p.rest", {}, el("span", {}, t("others")), el("span.number", {}, percent(rest))));
  view.append(el("p.note", {}, owner?.role === "assistant" ? t("goFromWhy") : owner ? t("yourWords") : t("templateWords")));
  return undefined;
}

function choice(row, isOwn, most, owner, found, index) {
  const inside = [el("span.label", { dir: "auto" }, word(row.text)), bar(row.probability / most), el("span.number", {}, percent(row.probability))];
  if (isOwn) return el("div.choice.own", { "aria-current": "true" }, ...inside);
  if (owner?.role !== "assistant") return el("div.choice", {}, ...inside);
  const label = t("goFrom", { word: visible(row.text), chance: percent(row.probability) });
  return el("button.choice", { type: "button", "aria-label": label, title: label, onclick: () => goFrom(owner, found, index, row) }, ...inside);
}

/** The message that a token belongs to; none for the marks between messages. */
function ownerOf(found, index) {
  const nodes = lineTo(state.open.leaf);
  const located = locate(found, nodes);
  return nodes.find((node) => located.get(node.id)?.some((piece) => piece.index === index));
}

const lineTo = (leaf) => [...before(state.conversation, leaf), leaf];

function goFrom(owner, found, index, row) {
  const pieces = locate(found, lineTo(state.open.leaf)).get(owner.id);
  const first = pieces[0].index;
  const text = pieces.filter((piece) => piece.index < index).map((piece) => piece.text).join("");
  state.open = null;
  branch(owner, { model: found.model, before: found.ids.slice(0, first), kept: found.ids.slice(first, index), text }, row);
}

// ---- layers

/** Fill a view with what has to be asked for, if it is still wanted when it comes. */
function whenKnown(view, found, index, show) {
  const late = setTimeout(() => view.append(el("p.quiet.opening", {}, t("opening"))), WAIT);
  details(found, index).then((answer) => {
    clearTimeout(late);
    if (!view.isConnected) return;
    view.querySelector(".opening")?.remove();
    show(answer);
    if (index + 1 < found.tokens.length) details(found, index + 1).catch(() => undefined); // likely the next to be opened
  }).catch((error) => {
    clearTimeout(late);
    view.querySelector(".opening")?.remove();
    view.append(el("p.trouble", { role: "alert" }, t("explainFailed", { message: error.message || t("unreachable") }),
      " ", el("button", { type: "button", onclick: renderPanel }, t("retry"))));
  });
}

function layers(view, found, index) {
  const token = found.tokens[index];
  view.append(el("p.why", {}, t("layersWhy")));
  if (index === 0) return view.append(el("p.note", {}, t("noChance")));
  return whenKnown(view, found, index, ({ lens }) => {
    const first = lens.findIndex((layer) => layer.top[0].id === token.id);
    const shown = visible(token.text || "\ufffd");
    view.append(el("ol.layers", {}, ...lens.map((layer, number) => el("li", {
      class: [layer.top[0].id === token.id ? "same" : "", number === first ? "first" : ""].join(" ").trim() || null,
    },
    el("span.layer", {}, layer.layer === 0 ? t("embedding") : String(layer.layer)),
    el("span.label", { dir: "auto" }, word(layer.top[0].text)),
    bar(layer.top[0].probability), el("span.number", {}, percent(layer.top[0].probability)),
    el("span.also", { dir: "auto" }, ...layer.top.slice(1, 4).flatMap((other) => [word(other.text), "   "])),
    number === first ? el("span.leads", {}, t("leads", { word: shown })) : null))));
    if (first < 0) view.append(el("p.note", {}, t("leadsNever", { word: shown })));
  });
}

// ---- attention

function attention(view, found, index) {
  view.append(el("p.why", {}, t("attentionWhy")));
  if (index === 0) {
    paintAttention(null);
    return view.append(el("p.note", {}, t("noChance")));
  }
  return whenKnown(view, found, index, (answer) => {
    const result = el("div");
    const map = el("div.heads");
    const changed = () => {
      map.replaceChildren(...headMap(answer.attention, changed));
      showWeights(result, found, answer.attention);
    };
    view.append(pickers(answer.attention, changed), map, result);
    changed();
  });
}

/** A small map of all heads, a row for each layer: darker where a head looks at few words. For pointing; the lists above do the same. */
function headMap(all, changed) {
  const most = Math.max(all.length, all[0].length);
  if (all[0][0].length < 2 || most > MOST_ON_MAP) return [];
  const cells = all.flatMap((heads, layer) => heads.map((row, head) => {
    const chosen = (state.layer < 0 || state.layer === layer) && (state.head < 0 || state.head === head) && state.layer + state.head > -2;
    const cell = svg("rect", { x: head * 14 + 1, y: layer * 14 + 1, width: 12, height: 12, rx: 3, class: chosen ? "chosen" : "" },
      svg("title", {}, `${t("layer")} ${layer + 1}, ${t("head")} ${head + 1}`));
    cell.style.fillOpacity = 0.1 + 0.9 * Math.max(...row.slice(1)) ** 2; // squared: the eye tells full from nearly full badly
    cell.addEventListener("click", () => {
      const same = state.layer === layer && state.head === head;
      [state.layer, state.head] = same ? [-1, -1] : [layer, head];
      for (const name of ["layer", "head"]) document.getElementById(`pick-${name}`).value = String(state[name]);
      changed();
    });
    return cell;
  }));
  const [width, height] = [all[0].length * 14, all.length * 14];
  return [svg("svg", { viewBox: `0 0 ${width} ${height}`, width: width * 1.25, height: height * 1.25, "aria-hidden": "true" }, ...cells),
    el("p.note", {}, t("headsWhy"))];
}

function pickers(all, changed) {
  const pick = (name, count, everything) => {
    const select = el("select", { id: `pick-${name}`, "aria-label": t(name), onchange: () => {
      state[name] = Number(select.value);
      changed();
    } }, el("option", { value: "-1" }, everything),
    ...Array.from({ length: count }, (_, number) => el("option", { value: String(number) }, `${t(name)} ${number + 1}`)));
    if (state[name] >= count) state[name] = -1;
    select.value = String(state[name]);
    return select;
  };
  return el("div.pickers", {}, pick("layer", all.length, t("allLayers")), pick("head", all[0].length, t("allHeads")));
}

function showWeights(result, found, all) {
  const shares = weights(all, state.layer, state.head);
  paintAttention(shares);
  const order = shares.map((share, index) => ({ share, index })).sort((one, other) => other.share - one.share);
  const top = order.filter(({ share }) => share > 0.005).slice(0, MOST_LOOKED);
  result.replaceChildren(
    el("h3", {}, t(state.layer < 0 || state.head < 0 ? "lookedMean" : "looked")),
    el("ol.bars.looked", {}, ...top.map(({ share, index }) => el("li", {}, el("button.choice", {
      type: "button", onclick: () => openToken(state.open.leaf, index),
    }, el("span.label.cut", {}, around(found.tokens, index)), bar(share / top[0].share), el("span.number", {}, percent(share)))))),
    shares.length > 1 && shares[0] > 0.3 ? el("p.note", {}, t("firstToken")) : "");
}

/** A token with a little of what stands before it, because the same word may come often. */
function around(tokens, index) {
  const earlier = tokens.slice(Math.max(0, index - 3), index).filter((token) => !token.special).map((token) => token.text).join("");
  const fragment = document.createDocumentFragment();
  if (index === 0 && tokens[0].special) return t("beginning");
  fragment.append(el("span.context", {}, earlier.replace(/\s+/g, " ").slice(-14)), el("strong", {}, word(tokens[index].text || "\ufffd")));
  return fragment;
}

// ---- surprise along the text

function sparkline(found) {
  const values = found.tokens.map((token) => bits(token.probability));
  const count = values.length;
  const highest = Math.max(4, ...values);
  const width = 100 / count;
  const drawing = svg("svg", { viewBox: "0 0 100 24", preserveAspectRatio: "none", role: "img", "aria-label": `${t("surprise")}. ${t("surpriseWhy")}` });
  const line = values.map((value, index) => {
    const x = (index * width).toFixed(3);
    return `M${x} 24v-${((value / highest) * 22 + 0.4).toFixed(2)}h${(width * (count > 200 ? 1 : 0.8)).toFixed(3)}V24z`;
  });
  drawing.append(svg("path", { d: line.join("") }));
  drawing.append(svg("path", { d: line[state.open.index], class: "here" }),
    svg("rect", { x: state.open.index * width - 0.3, y: 0, width: Math.max(width, 0.8), height: 24, class: "here" }));
  drawing.addEventListener("click", (event) => {
    const box = drawing.getBoundingClientRect();
    const index = Math.floor(((event.clientX - box.left) / box.width) * count);
    openToken(state.open.leaf, Math.max(0, Math.min(count - 1, index)));
  });
  return el("figure.spark", {}, drawing, el("figcaption", {}, t("surprise"), el("span.quiet", {}, t("surpriseWhy"))));
}

/** Whether the open token is still on the page. */
export const isOpenHere = () => Boolean(state.open && (path(state.conversation).includes(state.open.leaf) || state.open.leaf.pair));
