/**
 * Conversations, kept in this browser and nowhere else (IndexedDB; in memory where a browser forbids that), and small
 * choices (localStorage). Files in and out. The server keeps nothing.
 */

import { clean, preferences, trainingLine } from "./tree.js";

const DATABASE = "glasshouse";
const TABLE = "conversations";
const FORMAT = "glasshouse-conversations";

let database = null;
const memory = new Map();

const finished = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

/** Open the keeping place; says whether what is written will still be there tomorrow. */
export async function openStore() {
  try {
    const request = indexedDB.open(DATABASE, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    database = await finished(request);
    return true;
  } catch {
    return false;
  }
}

/** Change the table; done only when the change is committed: a page that closes right after a request may undo it. */
const change = (ask) => new Promise((resolve, reject) => {
  const transaction = database.transaction(TABLE, "readwrite");
  ask(transaction.objectStore(TABLE));
  transaction.oncomplete = () => resolve();
  transaction.onerror = transaction.onabort = () => reject(transaction.error);
});

/** All conversations, the latest first. */
export async function allConversations() {
  const all = database ? await finished(database.transaction(TABLE).objectStore(TABLE).getAll()) : [...memory.values()];
  return all.sort((one, other) => other.updated - one.updated);
}

/** Keep a conversation as it is now. */
export async function save(conversation) {
  if (!database) memory.set(conversation.id, conversation);
  else await change((table) => table.put(conversation));
}

/** Forget a conversation. */
export async function remove(id) {
  memory.delete(id);
  if (database) await change((table) => table.delete(id));
}

/** A small choice: theme, language, settings. */
export function recall(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`glasshouse.${key}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Keep a small choice; a browser that forbids it forgets it with the page. */
export function remember(key, value) {
  try {
    localStorage.setItem(`glasshouse.${key}`, JSON.stringify(value));
  } catch {
    // Private windows may have no storage: the choice then lasts as long as the page.
  }
}

/** Every conversation with all its versions, to import again. */
export function exportText(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/**
 * Conversations from an exported file; one that is here already, unchanged, is left alone.
 * @returns {Promise<number>} how many came in
 * @throws {SyntaxError|TypeError} it is no such file
 */
export async function importText(text) {
  const content = JSON.parse(text);
  if (content?.format !== FORMAT || !Array.isArray(content.conversations)) throw new TypeError("format");
  const here = new Map((await allConversations()).map((conversation) => [conversation.id, conversation]));
  let count = 0;
  for (const given of content.conversations) {
    const conversation = clean(given);
    if (!conversation) continue;
    const known = here.get(conversation.id);
    if (known && known.updated === conversation.updated) continue;
    if (known) conversation.id = crypto.randomUUID?.() ?? `${conversation.id}-${Date.now()}`;
    await save(conversation);
    count += 1;
  }
  return count;
}

const lines = (values) => values.map((value) => `${JSON.stringify(value)}\n`).join("");

/** The chosen path of each conversation, one line each: data for finetuning. */
export const trainingLines = (conversations) => lines(conversations.map(trainingLine));

/** Preference pairs of all conversations, one line each. */
export const preferenceLines = (conversations) => lines(conversations.flatMap(preferences));
