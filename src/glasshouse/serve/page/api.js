/**
 * The server: models, streams of tokens, explanations. Speaks OpenAI's interface and our few additions to it; knows
 * nothing of the page.
 */

/** What went wrong, in a way the page can act on. */
export class ServerError extends Error {
  /**
   * @param {"key"|"busy"|"unreachable"|"died"|"refused"} kind what to do about it
   * @param {string} message what the server said, if anything
   */
  constructor(kind, message = "") {
    super(message);
    this.kind = kind;
  }
}

const KEY = "glasshouse.key";

/** Use a key from now on; it lives as long as the tab. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

async function ask(address, { body, signal } = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(body ? { "content-type": "application/json" } : {}), ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(address, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("unreachable");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  const message = said.error?.message ?? said.detail?.[0]?.msg ?? `${response.status} ${response.statusText}`;
  if (response.status === 401) throw new ServerError("key", message);
  throw new ServerError(response.status === 429 || response.status === 503 ? "busy" : "refused", message);
}

/**
 * The models the server has.
 * @returns {Promise<{id: string, chat: boolean, base: boolean, room: number}[]>} base: it was never taught to answer;
 *   room: tokens that it reads
 */
export async function models() {
  const { data } = await (await ask("/v1/models")).json();
  return data.filter((model) => model.capabilities?.generate !== false).map((model) => ({
    id: model.id, chat: model.capabilities?.chat ?? true, base: model.capabilities?.instructed === false,
    room: model.max_model_len ?? Infinity,
  }));
}

/** What one text says, token by token. */
export async function explain(body, signal) {
  return (await ask("/v1/explain", { body, signal })).json();
}

/** Server-sent events of a response: the data of each, as text. */
async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    held += decoder.decode(value, { stream: !done });
    let end;
    while ((end = held.search(/\r?\n\r?\n/)) >= 0) {
      const data = held.slice(0, end).split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      held = held.slice(end).replace(/^\r?\n\r?\n/, "");
    }
    if (done) return;
  }
}

/**
 * Write text: yields pieces as they come.
 * @param {Object} body the request; with `messages` it is a chat, else a completion
 * @param {AbortSignal} signal ends it
 * @yields {{text: string, ids: number[], chance: number|null, promptIds?: number[], finish?: string}}
 * @throws {ServerError} "died" when the stream ends before the answer does
 */
export async function* write(body, signal) {
  const address = body.messages ? "/v1/chat/completions" : "/v1/completions";
  const logprobs = body.messages ? { logprobs: true } : { logprobs: 0 };
  const response = await ask(address, { body: { ...body, ...logprobs, stream: true, return_token_ids: true }, signal });
  let finished = false;
  try {
    for await (const data of events(response)) {
      if (data === "[DONE]") {
        finished = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError("refused", chunk.error.message);
      const piece = readChunk(chunk);
      finished ||= Boolean(piece?.finish);
      if (piece) yield piece;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("died");
  }
  if (!finished) throw new ServerError("died");
}

/** Both interfaces' chunks in one shape. */
function readChunk(chunk) {
  const choice = chunk.choices?.[0];
  const promptIds = chunk.prompt_token_ids ?? choice?.prompt_token_ids;
  if (!choice) return promptIds ? { text: "", ids: [], chance: null, promptIds } : null;
  const logprobs = choice.logprobs;
  const logs = logprobs?.content?.map((token) => token.logprob) ?? logprobs?.token_logprobs ?? [];
  const sure = logs.filter((value) => typeof value === "number");
  return {
    text: choice.delta?.content ?? choice.text ?? "",
    ids: choice.token_ids ?? choice.delta?.token_ids ?? logprobs?.token_ids ?? [],
    chance: sure.length ? Math.exp(sure.reduce((sum, value) => sum + value, 0) / sure.length) : null,
    promptIds, finish: choice.finish_reason ?? undefined,
  };
}
