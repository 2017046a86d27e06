/**
 * What is known of a text from the inside: the odds of each token (asked once for a text), the lens and the attention
 * at a place (asked once for a place), and which tokens each message on the page is made of.
 */

import { explain } from "./api.js";
import { modelNamed, state, tell } from "./state.js";
import { save } from "./store.js";
import { before, joined, messages } from "./tree.js";

const ALTERNATIVES = 8;
const FEWER = 3; // for long texts, where eight of each token would be megabytes
const LONG = 1500; // tokens

/** Node id -> {ids, tokens, promptLength, details}: the last explanation of the text that ends with the node. */
const explanations = new Map();
const asked = new Map();

/** The explanation of the text that ends with a node, where it is known and still true. */
export function explanation(node) {
  const found = node && explanations.get(node.id);
  return found && found.text === node.text ? found : undefined;
}

/** Have the text that ends with a node explained, once; tells "explained" when it is. */
export async function requestExplanation(conversation, node) {
  const key = `${node.id} ${node.text.length}`;
  if (explanation(node) || asked.has(key) || state.writing.has(node.id) || !node.text) return;
  asked.set(key, true);
  const model = modelNamed(node.model) ? node.model : state.model;
  try {
    const answer = await explain({ model, ...textFor(conversation, node), alternatives: (node.ids?.length ?? node.text.length / 3) > LONG ? FEWER : ALTERNATIVES });
    const ids = answer.tokens.map((token) => token.id);
    mend(conversation, node, answer.tokens);
    explanations.set(node.id, { model, ids, tokens: answer.tokens, text: node.text, details: new Map(), promptLength: node.ids?.length ? node.promptIds?.length : undefined });
    tell("explained", node);
  } catch (error) {
    asked.delete(key);
    tell("problem", error);
  }
}

/** The text to explain: exactly the tokens that were written where they are known, else the words. */
function textFor(conversation, node) {
  if (node.promptIds && node.ids?.length) return { token_ids: [...node.promptIds, ...node.ids] };
  const nodes = [...before(conversation, node), node];
  if (conversation.mode === "chat") return { messages: messages(conversation, nodes, conversation.system) };
  return { prompt: joined(nodes) };
}

/** A branch may begin inside a character; with all its tokens known the character is whole. */
function mend(conversation, node, tokens) {
  if (!node.text.includes("\ufffd") || !node.ids?.length) return;
  const whole = tokens.slice(node.promptIds.length).filter((token) => !token.special).map((token) => token.text).join("");
  if (whole === node.text) return;
  node.text = whole;
  save(conversation);
}

/**
 * Lens and attention at the choice of a token: asked once. The token was chosen when the one before had been read.
 * @returns {Promise<{lens: Object[], attention: number[][][]}>}
 */
export function details(found, index) {
  const position = index - 1;
  if (!found.details.has(position)) {
    const request = explain({
      model: found.model, token_ids: found.ids.slice(0, index), alternatives: 0, position, lens: true, attention: true,
    });
    request.catch(() => found.details.delete(position));
    found.details.set(position, request);
  }
  return found.details.get(position);
}

/**
 * Which tokens each message is made of.
 * @param {Object} found an explanation
 * @param {Object[]} nodes the messages, first to last; the last is the one that was explained
 * @returns {Map<string, {index: number, text: string}[]>} by node id; a message that the template changed is not in it
 */
export function locate(found, nodes) {
  const starts = [];
  let whole = "";
  for (const token of found.tokens) {
    starts.push(whole.length);
    whole += token.text;
  }
  const located = new Map();
  let from = 0;
  for (const node of nodes) {
    const exact = node === nodes.at(-1) && found.promptLength !== undefined ? starts[found.promptLength] : undefined;
    const words = node.text;
    let begin = exact !== undefined && whole.startsWith(words, exact) ? exact : whole.indexOf(words, from);
    let length = words.length;
    if (begin < 0) { // a template may strip blanks
      begin = whole.indexOf(words.trim(), from);
      length = words.trim().length;
    }
    if (begin < 0 || !length) continue;
    located.set(node.id, cut(found.tokens, starts, begin, begin + length));
    from = begin + length;
  }
  return located;
}

function cut(tokens, starts, begin, end) {
  const pieces = [];
  tokens.forEach((token, index) => {
    const stop = starts[index] + token.text.length;
    const inside = token.text ? stop > begin && starts[index] < end : starts[index] >= begin && starts[index] < end;
    if (inside) pieces.push({ index, text: token.text.slice(Math.max(0, begin - starts[index]), end - starts[index]) });
  });
  return pieces;
}

/**
 * Pieces as they are shown: tokens that only together are a character share one place.
 * @returns {{indices: number[], text: string}[]}
 */
export function groups(pieces) {
  const found = [];
  let open = [];
  for (const { index, text } of pieces) {
    open.push(index);
    if (text) {
      found.push({ indices: open, text });
      open = [];
    }
  }
  if (open.length && found.length) found.at(-1).indices.push(...open);
  return found;
}

/** How surprised the model was, from 0 (sure) to 5: steps that the eye can tell apart. */
export function surpriseStep(chance) {
  if (chance === null || chance === undefined) return 0;
  return [0.75, 0.4, 0.16, 0.05, 0.01].filter((border) => chance < border).length;
}

/** Surprise in bits: how many yes-or-no questions the token was away. */
export const bits = (chance) => (chance === null ? 0 : Math.min(20, -Math.log2(Math.max(chance, 1e-9))));

/**
 * Attention averaged over the chosen layers and heads.
 * @param {number[][][]} attention [layer][head][token]
 * @param {number} layer -1 for all
 * @param {number} head -1 for all
 * @returns {number[]} a weight for each token
 */
export function weights(attention, layer, head) {
  const rows = (layer < 0 ? attention : [attention[layer]]).flatMap((heads) => (head < 0 ? heads : [heads[head]]));
  return rows[0].map((_, token) => rows.reduce((sum, row) => sum + row[token], 0) / rows.length);
}
