/** What an empty conversation says: an invitation, three ways to begin, and what else there is to see. */

import { el } from "./dom.js";
import { t } from "./i18n.js";
import { state } from "./state.js";
import { say } from "./writer.js";

/** The invitation. */
export function welcome() {
  const chat = state.conversation?.mode === "chat";
  const examples = [1, 2, 3].map((number) => t(`example${chat ? "Chat" : "Text"}${number}`));
  return el("section.welcome", {},
    el("h1", {}, t(chat ? "welcomeChat" : "welcomeText")),
    el("ul.examples", { "aria-label": t("examples") }, ...examples.map((text) => el("li", {},
      el("button", { type: "button", disabled: !state.models.length, onclick: () => say(text) }, text.trim() + (/[\p{L},，]\s*$/u.test(text) && !chat ? "…" : ""))))),
    el("p.quiet", {}, t("welcomeWhy")));
}
