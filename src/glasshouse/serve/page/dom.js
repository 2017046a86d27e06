/**
 * Building the document. Everything a model, a user or a file says becomes a text node here: nothing on this page
 * is ever parsed as HTML, so nothing that a model writes can run.
 */

const SVG = "http://www.w3.org/2000/svg";

/** Outlines on a grid of 24. */
const ICONS = {
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  menu: "M4 7h16M4 12h16M4 17h10",
  eye: "M2 12s4-6.5 10-6.5S22 12 22 12s-4 6.5-10 6.5S2 12 2 12zM12 9a3 3 0 100 6 3 3 0 000-6z",
  dials: "M4 8h8.5M17.5 8H20M4 16h2.5M11.5 16H20M15 5.5a2.5 2.5 0 100 5 2.5 2.5 0 000-5zM9 13.5a2.5 2.5 0 100 5 2.5 2.5 0 000-5z",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  box: "M4 8h16v11H4zM6 5h12l2 3H4zM10 12h4",
  help: "M9.2 9a2.9 2.9 0 115 2c-1.2 1.1-2.2 1.5-2.2 3M12 17.5v.01",
  sun: "M12 8a4 4 0 100 8 4 4 0 000-8zM12 3v2M12 19v2M3 12h2M19 12h2M5.6 5.600L7 7M17 17l1.4 1.400M5.6 18.400L7 17M17 7l1.4-1.4",
  moon: "M20 14.5A8 8 0 019.5 4a8 8 0 1010.5 10.5z",
  edit: "M5 19l1-4L16 5l3 3L9 18zM14 7l3 3",
  again: "M19 12a7 7 0 11-2-4.900M19 4v4h-4",
  copy: "M9 9h10v11H9zM6 15H5V4h10v2",
  up: "M7 11v8H4v-8zM7 12l4-8c1.5 0 2.5 1 2.2 2.5L12.5 10h5.300c1.3 0 2 1 1.7 2.200l-1.4 5.300c-.3 1-1 1.5-2 1.5H7",
  down: "M17 13V5h3v8zM17 12l-4 8c-1.5 0-2.5-1-2.2-2.5l.7-3.5H6.200c-1.3 0-2-1-1.7-2.200l1.4-5.300c.3-1 1-1.5 2-1.5H17",
  left: "M14 6l-6 6 6 6",
  right: "M10 6l6 6-6 6",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
};

/**
 * An element.
 * @param {string} tag name of the element, with classes after dots: "div.turn.mine"
 * @param {Object} [attributes] attributes; `onclick` and other functions become listeners, null leaves one out
 * @param {...(Node|string|null)} children strings become text
 * @returns {HTMLElement}
 */
export function el(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const element = document.createElement(name);
  if (classes.length) element.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** An element of a drawing. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, String(value));
  element.append(...children);
  return element;
}

/** An icon that says nothing to a screen reader: its button has a label. */
export function icon(name) {
  return svg("svg", { viewBox: "0 0 24 24", class: "icon-drawing", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));
}

/** A button with an icon, a label for everyone, and what it does. */
export function iconButton(name, label, onclick, attributes = {}) {
  return el("button.icon", { type: "button", "aria-label": label, title: label, onclick, ...attributes }, icon(name));
}

/** A bar whose length is a share from 0 to 1. Its number stands beside it, so it is silent. */
export function bar(share) {
  const fill = el("span.fill");
  fill.style.inlineSize = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return el("span.bar", { "aria-hidden": "true" }, fill);
}

/** A chance in words for people: "32 %", "0.4 %", "under 0.01 %". */
export function percent(chance) {
  if (chance === null || chance === undefined) return "–";
  const hundred = chance * 100;
  if (hundred > 0 && hundred < 0.01) return "< 0.01 %";
  if (hundred > 99.95 && hundred < 100) return "> 99.9 %";
  return `${hundred >= 10 || hundred === 0 ? Math.round(hundred) : hundred >= 1 ? hundred.toFixed(1) : hundred.toPrecision(1)} %`;
}

/** Text with what cannot be seen made visible: blanks, line ends, parts of a character. */
export function visible(text) {
  const shown = text
    .replace(/[\ufffd\u0000-\u0008\u000b-\u001f\u007f-\u009f]+/g, "▯")
    .replace(/\n/g, "↵")
    .replace(/\t/g, "⇥")
    .replace(/^ | $/g, "·");
  return shown === "" ? "∅" : shown;
}

/** The same for the eye: what stands for a blank is faint, so that the word is what one reads. */
export function word(text) {
  const shown = visible(text);
  const fragment = document.createDocumentFragment();
  for (const part of shown.split(/([·↵⇥▯∅])/)) {
    if (part) fragment.append(/^[·↵⇥▯∅]$/.test(part) && shown.length > 1 ? el("span.blank", {}, part) : part);
  }
  return fragment;
}

/** Offer a text as a file to keep. */
export function download(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
