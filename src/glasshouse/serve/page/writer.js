/**
 * Having text written: what is asked of the server for a place in the tree, and what becomes of the answer. Whatever
 * happens (stop, a server that dies, a closed page), what was written so far is kept.
 */

import { ServerError, write } from "./api.js";
import { modelNamed, state, tell } from "./state.js";
import { save } from "./store.js";
import { addNode, before, joined, messages, newConversation } from "./tree.js";

const SAVE_EVERY = 1500; // milliseconds between savings while text comes

/** The sampling settings as the server names them; no model is asked for more than it can hold. */
function samplingFields(model) {
  const { stops, seed, ...numbers } = state.sampling;
  const stop = stops.split("\n").filter(Boolean).slice(0, 4);
  return {
    ...numbers,
    max_tokens: Math.min(numbers.max_tokens, modelNamed(model)?.room ?? Infinity),
    seed: seed === "" ? Math.floor(Math.random() * 2 ** 31) : Number(seed),
    ...(stop.length ? { stop } : {}),
  };
}

/** The request that writes a node from its beginning. */
function requestFor(conversation, node) {
  const nodes = before(conversation, node);
  const text = conversation.mode === "chat" ? { messages: messages(conversation, nodes, conversation.system) } : { prompt: joined(nodes) };
  return { model: node.model, ...text, ...samplingFields(node.model) };
}

/** Whether anything is being written in the conversation on the page. */
export const isWriting = () => Object.keys(state.conversation?.nodes ?? {}).some((id) => state.writing.has(id));

/** Stop everything that is being written in the conversation on the page. */
export function stopAll() {
  for (const [id, work] of state.writing) if (id in (state.conversation?.nodes ?? {})) work.controller.abort();
}

/** Say something, and have it answered: by two models where a second is chosen. */
export function say(text) {
  const conversation = state.conversation;
  const last = lastNode(conversation);
  const asked = addNode(conversation, last?.id ?? "root", "user", { text });
  if (!state.conversations.includes(conversation)) state.conversations.unshift(conversation);
  answer(asked);
}

/** Have a node answered, or its text gone on with. */
export function answer(asked) {
  const models = [state.model, state.second].filter((id, index, all) => id && all.indexOf(id) === index);
  const pair = models.length === 2 ? asked.id : undefined;
  const nodes = models.map((model) => addNode(state.conversation, asked.id, "assistant", { model, pair }));
  state.conversation.chosen[asked.id] = nodes[0].id;
  nodes.forEach((node) => run(state.conversation, node, requestFor(state.conversation, node)));
}

/** Another version of an answer. */
export function again(node) {
  const model = modelNamed(node.model) && !node.pair ? node.model : state.model;
  const version = addNode(state.conversation, node.parent, "assistant", { model });
  run(state.conversation, version, requestFor(state.conversation, version));
}

/** Go on where an answer ended: exactly there, where its tokens are known. */
export function goOn(node) {
  const exact = node.promptIds && node.ids?.length;
  if (!exact && state.conversation.mode === "chat") return retry(node);
  const prompt = exact ? [...node.promptIds, ...node.ids] : joined([...before(state.conversation, node), node]);
  return run(state.conversation, node, { model: node.model, prompt, ...samplingFields(node.model) });
}

/** Write a node anew, in its place: for one that failed before it said anything. */
export function retry(node) {
  Object.assign(node, { text: "", ids: undefined, promptIds: undefined });
  if (!modelNamed(node.model)) node.model = state.model;
  return run(state.conversation, node, requestFor(state.conversation, node));
}

/**
 * A new version of an answer that says another word at one place, and goes on from there.
 * @param {Object} node the answer
 * @param {{model: string, before: number[], kept: number[], text: string}} start ids read before the answer, ids of the
 *   answer up to the place, and their text
 * @param {{id: number, text: string, special: boolean}} word what it says instead
 */
export function branch(node, start, word) {
  const version = addNode(state.conversation, node.parent, "assistant", {
    model: start.model, promptIds: start.before, ids: [...start.kept, word.id],
    text: start.text + (word.special ? "" : word.text),
  });
  if (word.special) { // the other word was to end here
    version.finish = "stop";
    save(state.conversation);
    return tell("conversation");
  }
  return run(state.conversation, version, { model: start.model, prompt: [...start.before, ...version.ids], ...samplingFields(start.model) });
}

/** The last node of the chosen path. */
export function lastNode(conversation) {
  let id = conversation.chosen.root;
  while (id && conversation.chosen[id]) id = conversation.chosen[id];
  return conversation.nodes[id];
}

/** Begin an empty conversation, in the way that suits the model. */
export function begin(mode) {
  const model = modelNamed(state.model);
  const suited = model && (model.base || !model.chat) ? "text" : "chat";
  state.conversation = newConversation(mode ?? suited);
  state.open = null;
  tell("conversation");
}

/** Write into a node until the answer ends, is stopped or fails. */
async function run(conversation, node, request) {
  const controller = new AbortController();
  const work = { controller, pieces: [], count: 0, first: 0 };
  state.writing.set(node.id, work);
  node.error = node.finish = undefined;
  const already = node.text.length;
  if (already) work.pieces.push({ text: node.text, chance: null });
  tell("conversation");
  let saved = performance.now();
  await save(conversation);
  try {
    for await (const piece of write(request, controller.signal)) {
      take(node, work, piece);
      tell("progress", node);
      if (performance.now() - saved > SAVE_EVERY) {
        saved = performance.now();
        save(conversation);
      }
    }
    node.finish ??= "stop";
  } catch (error) {
    if (error.name === "AbortError") node.finish = "stopped";
    else fail(node, error);
  }
  state.writing.delete(node.id);
  conversation.updated = Date.now();
  await save(conversation);
  tell("finished", node);
}

function take(node, work, piece) {
  node.promptIds ??= piece.promptIds;
  node.text += piece.text;
  if (piece.ids.length) node.ids = [...(node.ids ?? []), ...piece.ids];
  if (piece.finish) node.finish = piece.finish;
  const count = piece.ids.length || (piece.text ? 1 : 0);
  if (!count && !piece.text) return;
  work.pieces.push({ text: piece.text, chance: piece.chance });
  const now = performance.now();
  // The first piece pays for reading the prompt: the rate counts from there.
  if (work.first === 0) work.first = now;
  else {
    work.count += count;
    node.rate = (work.count * 1000) / Math.max(1, now - work.first);
  }
}

function fail(node, error) {
  const kind = error instanceof ServerError ? error.kind : "refused";
  node.error = kind;
  node.reason = error.message;
  tell("problem", error);
}
