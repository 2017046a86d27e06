/**
 * Markdown as a model writes it, to document nodes: paragraphs, headings, lists, quotes, code, emphasis, links.
 *
 * Small on purpose. What it does not know stays as it was written; it builds nodes with text in them, and the only
 * address it lets through is http or https, so hostile text is shown and runs nothing.
 */

import { el } from "./dom.js";

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]*?\S)\*\*|__(?=\S)([\s\S]*?\S)__(?!\w)|\*(?=[^\s*])([\s\S]*?[^\s*])\*(?!\*)|(?<!\w)_(?=[^\s_])([\s\S]*?[^\s_])_(?!\w)|!?\[([^\]\n]*)\]\(\s*([^\s()]*(?:\([^\s()]*\)[^\s()]*)*)[^)\n]*\)|(https?:\/\/[^\s<>"'）】。，]+[^\s<>"'.,;:!?)\]）】。，])/;

/** Only addresses that a browser may open in a new tab, and nothing that runs. */
function safeAddress(address) {
  try {
    const parsed = new URL(address);
    return parsed.protocol === "http:" || parsed.protocol === "https:" ? parsed.href : null;
  } catch {
    return null;
  }
}

function link(text, address) {
  const safe = safeAddress(address);
  if (safe === null) return document.createTextNode(text);
  return el("a", { href: safe, target: "_blank", rel: "noopener noreferrer nofollow", title: safe }, text);
}

/** Emphasis, code and links of a piece of text. */
export function inline(text, depth = 0) {
  const nodes = [];
  let rest = text;
  while (rest) {
    const found = depth < 8 ? INLINE.exec(rest) : null;
    if (!found) break;
    if (found.index) nodes.push(document.createTextNode(rest.slice(0, found.index)));
    const [whole, , code, bold, bold2, italic, italic2, label, address, bare] = found;
    if (code !== undefined) nodes.push(el("code", {}, code));
    else if (bold ?? bold2) nodes.push(el("strong", {}, ...inline(bold ?? bold2, depth + 1)));
    else if (italic ?? italic2) nodes.push(el("em", {}, ...inline(italic ?? italic2, depth + 1)));
    else if (bare !== undefined) nodes.push(link(bare, bare));
    else nodes.push(link(label || address, address));
    rest = rest.slice(found.index + whole.length);
  }
  if (rest) nodes.push(document.createTextNode(rest));
  return nodes;
}

/**
 * Cut a text into blocks, each a kind and its source: what has not changed since the last time need not be built again.
 * @returns {{kind: string, source: string}[]}
 */
export function blocks(text) {
  const found = [];
  let open = null;
  for (const line of text.split("\n")) {
    if (open?.kind === "code") {
      open.source += `\n${line}`;
      if (line.trimEnd() === open.fence) open = null;
      continue;
    }
    const fence = /^ {0,3}(`{3,}|~{3,})/.exec(line);
    const kind = fence ? "code" : kindOf(line);
    if (kind === "blank") {
      open = open?.kind === "list" ? { ...open, loose: true } : null;
      continue;
    }
    const goesOn = open && (open.kind === kind || (kind === "paragraph" && open.kind === "list" && !open.loose) ||
      (open.kind === "list" && /^\s{2,}/.test(line)));
    if (goesOn && kind !== "heading" && kind !== "rule") {
      found.at(-1).source += `\n${line}`;
      continue;
    }
    open = { kind, source: line, fence: fence?.[1] };
    found.push(open);
  }
  return found.map(({ kind, source }) => ({ kind, source }));
}

function kindOf(line) {
  if (!line.trim()) return "blank";
  if (/^#{1,6}\s/.test(line)) return "heading";
  if (/^ {0,3}([-*_])( *\1){2,} *$/.test(line)) return "rule";
  if (/^\s*([-*+]|\d{1,9}[.)])\s+\S/.test(line)) return "list";
  if (/^>/.test(line)) return "quote";
  return "paragraph";
}

/** One block's node. */
export function build({ kind, source }) {
  if (kind === "code") return codeBlock(source);
  if (kind === "rule") return el("hr");
  if (kind === "list") return list(source.split("\n"));
  if (kind === "quote") return el("blockquote", {}, ...blocks(source.replace(/^> ?/gm, "")).slice(0, 500).map(build));
  if (kind === "heading") {
    const [, marks, words] = /^(#+)\s+([\s\S]*?)\s*#*$/.exec(source) ?? [null, "#", source];
    return el(`h${Math.min(6, marks.length + 2)}`, {}, ...inline(words)); // h1 and h2 are the page's own
  }
  return el("p", {}, ...inline(source));
}

function codeBlock(source) {
  const lines = source.split("\n");
  const fence = /^\s*(`+|~+)\s*([\w+#.-]*)/.exec(lines[0]);
  const closed = lines.length > 1 && lines.at(-1).trimEnd() === fence[1];
  const code = lines.slice(1, closed ? -1 : undefined).join("\n");
  return el("pre", { tabindex: "0", "data-language": fence[2] || null }, el("code", {}, code));
}

function list(lines) {
  const items = [];
  const base = /^\s*/.exec(lines[0])[0].length;
  for (const line of lines) {
    const mark = /^(\s*)([-*+]|\d{1,9}[.)])\s+([\s\S]*)$/.exec(line);
    if (mark && mark[1].length < base + 2) items.push({ words: mark[3], below: [] });
    else if (mark || items.at(-1).below.length) items.at(-1).below.push(line);
    else items.at(-1).words += `\n${line.trim()}`;
  }
  const start = /^\s*(\d+)/.exec(lines[0]);
  return el(start ? "ol" : "ul", { start: start && start[1] !== "1" ? start[1] : null },
    ...items.map((item) => el("li", {}, ...inline(item.words), item.below.length && base < 12 ? list(item.below) : null)));
}

/** The source of each node built by `renderMarkdown`. */
const sources = new WeakMap();

/** Make an element show a text, touching only the blocks that changed: a long answer grows without being rebuilt. */
export function renderMarkdown(element, text) {
  const wanted = blocks(text);
  wanted.forEach((block, index) => {
    const there = element.childNodes[index];
    const source = `${block.kind}:${block.source}`;
    if (there && sources.get(there) === source) return;
    const node = build(block);
    sources.set(node, source);
    if (there) there.replaceWith(node);
    else element.append(node);
  });
  while (element.childNodes.length > wanted.length) element.lastChild.remove();
}
