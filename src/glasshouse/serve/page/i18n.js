/** The page's language: English or Chinese, from the browser until somebody chooses. */

import { recall, remember } from "./store.js";
import { WORDS } from "./words.js";

const LANGUAGES = ["en", "zh"];
let language = recall("language", null) ?? (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");

/** The words for a key, with values in their places. */
export function t(key, values = {}) {
  const words = WORDS[key][LANGUAGES.indexOf(language)];
  return words.replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

/** Whether a key has words. */
export const known = (key) => key in WORDS;

/** The other language and how it calls itself. */
export const otherName = () => (language === "en" ? "中文" : "English");

/** Change to the other language. */
export function switchLanguage() {
  language = language === "en" ? "zh" : "en";
  remember("language", language);
}

/** Put the words into everything that names its key in the document: data-t, and data-t-label for what icons mean. */
export function translatePage() {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  for (const element of document.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of document.querySelectorAll("[data-t-label]")) {
    const words = t(element.dataset.tLabel);
    element.setAttribute("aria-label", words);
    if (element.tagName === "BUTTON") element.title = words;
  }
}
