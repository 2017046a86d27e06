/**
 * A conversation is a tree of versions: editing, asking again or choosing another word adds a branch and loses nothing.
 * Plain data and functions on it; knows nothing of the page, the server or where it is kept.
 *
 * Conversation: {id, title, mode: "chat" | "text", created, updated, nodes: {id: Node}, chosen: {parent: child}}
 * Node: {id, parent, role, text, children: [id], model, promptIds, ids, finish, error, rating, pair, rate}
 */

export const ROOT = "root";

const newId = () => crypto.randomUUID?.() ?? `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;

/** An empty conversation. */
export function newConversation(mode) {
  const now = Date.now();
  return {
    id: newId(), title: "", mode, created: now, updated: now, chosen: {},
    nodes: { [ROOT]: { id: ROOT, parent: null, role: "root", text: "", children: [] } },
  };
}

/** Add a version below a node and choose it. */
export function addNode(conversation, parent, role, facts = {}) {
  const node = { id: newId(), parent, role, text: "", children: [], rating: 0, ...facts };
  conversation.nodes[node.id] = node;
  conversation.nodes[parent].children.push(node.id);
  conversation.chosen[parent] = node.id;
  conversation.updated = Date.now();
  if (role === "user" && !conversation.title) conversation.title = node.text.trim().slice(0, 80);
  return node;
}

/** The chosen versions from the first to the last. */
export function path(conversation) {
  const nodes = [];
  let id = conversation.chosen[ROOT];
  while (id && conversation.nodes[id]) {
    nodes.push(conversation.nodes[id]);
    id = conversation.chosen[id];
  }
  return nodes;
}

/** The versions before a node, first to last, without it. */
export function before(conversation, node) {
  const nodes = [];
  for (let id = node.parent; id !== ROOT; id = conversation.nodes[id].parent) nodes.unshift(conversation.nodes[id]);
  return nodes;
}

/** All versions of a node, itself included. */
export function versions(conversation, node) {
  return conversation.nodes[node.parent].children.map((id) => conversation.nodes[id]);
}

/** Choose a node and, above it, all that leads to it. */
export function choose(conversation, node) {
  for (let id = node.id; id !== ROOT; id = conversation.nodes[id].parent) {
    conversation.chosen[conversation.nodes[id].parent] = id;
  }
}

/** What the model reads as the conversation before a node: messages for a chat. */
export function messages(conversation, nodes, system) {
  const said = nodes.map(({ role, text }) => ({ role, content: text }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

/** What the model reads before a node as one text: free completion. */
export const joined = (nodes) => nodes.map((node) => node.text).join("");

/** Where the other answer of a side-by-side pair is. */
export function partner(conversation, node) {
  return node.pair ? versions(conversation, node).find((other) => other.pair === node.pair && other !== node) : undefined;
}

/**
 * Answers people liked beside answers they did not like to the same words: what preference training reads.
 * @returns {{prompt: *, chosen: *, rejected: *}[]}
 */
export function preferences(conversation) {
  const found = [];
  for (const asked of Object.values(conversation.nodes)) {
    const answers = asked.children.map((id) => conversation.nodes[id]).filter((node) => node.role === "assistant" && node.text);
    const earlier = asked.id === ROOT ? [] : [...before(conversation, asked), asked];
    for (const liked of answers.filter((node) => node.rating > 0)) {
      for (const disliked of answers.filter((node) => node.rating < 0)) {
        const say = (node) => (conversation.mode === "chat" ? [{ role: "assistant", content: node.text }] : node.text);
        const prompt = conversation.mode === "chat" ? messages(conversation, earlier, conversation.system) : joined(earlier);
        found.push({ prompt, chosen: say(liked), rejected: say(disliked) });
      }
    }
  }
  return found;
}

/** The chosen path as one line of training data. */
export function trainingLine(conversation) {
  const nodes = path(conversation).filter((node) => node.text);
  return conversation.mode === "chat" ? { messages: messages(conversation, nodes, conversation.system) } : { text: joined(nodes) };
}

const words = (value) => (typeof value === "string" ? value : "");
const numbers = (list) => (Array.isArray(list) && list.every(Number.isInteger) ? list : undefined);

/**
 * A conversation from a file, with nothing in it but what belongs there: a file may come from a stranger.
 * @returns {Object|null} null when it is none
 */
export function clean(given) {
  if (typeof given !== "object" || given === null || typeof given.nodes !== "object" || given.nodes === null) return null;
  const conversation = newConversation(given.mode === "chat" ? "chat" : "text");
  if (typeof given.id === "string") conversation.id = given.id.slice(0, 100);
  conversation.title = words(given.title).slice(0, 200);
  if (typeof given.system === "string") conversation.system = given.system;
  for (const key of ["created", "updated"]) if (Number.isFinite(given[key])) conversation[key] = given[key];
  const entries = new Map(Object.entries(given.nodes));
  const queue = [ROOT];
  while (queue.length) {
    const parent = queue.shift();
    const children = entries.get(parent)?.children;
    for (const id of Array.isArray(children) ? children : []) {
      const node = entries.get(id);
      if (typeof id !== "string" || id in conversation.nodes || typeof node !== "object" || node === null) continue;
      conversation.nodes[id] = cleanNode(id, parent, node);
      conversation.nodes[parent].children.push(id);
      queue.push(id);
    }
    const chosen = given.chosen?.[parent];
    const there = conversation.nodes[parent].children;
    if (there.length) conversation.chosen[parent] = there.includes(chosen) ? chosen : there.at(-1);
  }
  return conversation;
}

function cleanNode(id, parent, node) {
  return {
    id, parent, children: [],
    role: node.role === "user" ? "user" : "assistant",
    text: words(node.text),
    model: typeof node.model === "string" ? node.model : undefined,
    pair: typeof node.pair === "string" ? node.pair : undefined,
    finish: typeof node.finish === "string" ? node.finish : undefined,
    error: typeof node.error === "string" ? node.error : undefined,
    rating: node.rating > 0 ? 1 : node.rating < 0 ? -1 : 0,
    rate: Number.isFinite(node.rate) ? node.rate : undefined,
    promptIds: numbers(node.promptIds),
    ids: numbers(node.ids),
  };
}
