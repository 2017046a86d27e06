/** What the page knows at this moment, in one place, and who wants to hear when it changes. */

import { recall, remember } from "./store.js";

/** How words are chosen, until somebody chooses otherwise. */
export const DEFAULTS = {
  temperature: 0.8, top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1, max_tokens: 200, seed: "", stops: "",
};

export const state = {
  /** @type {{id: string, chat: boolean, base: boolean, room: number}[]} */
  models: [],
  model: recall("model", ""),
  second: "",
  conversations: [],
  conversation: null,
  see: recall("see", false),
  /** The open word: a leaf of the tree, whose text was explained, and the number of a token in it. */
  open: null,
  tab: "chances",
  layer: -1,
  head: -1,
  sampling: { ...DEFAULTS, ...recall("sampling", {}) },
  /** Node id -> what is being written there. */
  writing: new Map(),
};

/** The model of a name, as the server described it. */
export const modelNamed = (id) => state.models.find((model) => model.id === id);

/** Change how words are chosen, and keep it. */
export function setSampling(values) {
  Object.assign(state.sampling, values);
  remember("sampling", state.sampling);
}

const listeners = new Map();

/**
 * Hear of a change.
 * @param {"conversation"|"list"|"progress"|"finished"|"open"|"explained"|"problem"} event
 */
export function on(event, listener) {
  listeners.set(event, [...(listeners.get(event) ?? []), listener]);
}

/** Tell of a change. */
export function tell(event, value) {
  for (const listener of listeners.get(event) ?? []) listener(value);
}
