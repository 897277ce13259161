// Small facts about a conversation: the context it takes, the speed, and what an empty one shows.

import { h, icon, byId } from "./dom.js";
import { speedText } from "./view.js";

const CHARACTERS_PER_TOKEN = 4; // English; only until the server has counted
const FULL = 0.85; // from here on the meter warns

/** How much of the model's context the shown messages take: as the server counted, what came later is estimated. */
export function showContext(messages, answer, most) {
  const place = byId("context");
  place.hidden = !most || !messages.length;
  if (place.hidden) return;
  const { used, exact } = tokensUsed(messages, answer);
  const share = Math.min(1, used / most);
  const meter = byId("meter");
  const text = `${exact ? "" : "≈ "}${used.toLocaleString("en")} of ${most.toLocaleString("en")} tokens`;
  meter.setAttribute("aria-valuemax", String(most));
  meter.setAttribute("aria-valuenow", String(Math.min(used, most)));
  meter.setAttribute("aria-valuetext", text);
  meter.classList.toggle("full", share >= FULL);
  byId("meter-bar").style.width = `${Math.max(1, 100 * share).toFixed(1)}%`;
  byId("context-text").textContent = text;
  place.title = share >= FULL ? "The context is nearly full. What does not fit is refused, never cut." : "Context used";
}

function tokensUsed(messages, answer) {
  let at = messages.length - 1;
  while (at >= 0 && !(messages[at].stats && messages[at] !== answer?.message)) at -= 1;
  const counted = at < 0 ? 0 : messages[at].stats.prompt + messages[at].stats.completion;
  const later = messages.slice(at + 1).reduce((sum, { text }) => sum + text.length, 0);
  return { used: counted + Math.ceil(later / CHARACTERS_PER_TOKEN), exact: at >= 0 && later === 0 };
}

/** Tokens a second: of the answer that is being written, else of the last one. */
export function showSpeed(messages, answer) {
  const stats = messages.at(-1)?.stats;
  const speed = answer ? answer.speed() : stats?.speed || 0;
  byId("speed").textContent = speed ? speedText(speed) : "";
}

const QUESTIONS = [
  ["Explain", "Explain how a bicycle stays upright, in five sentences."],
  ["Write", "Write a friendly email that moves a meeting to Thursday."],
  ["Code", "Write a Python function that finds the longest word in a text."],
  ["Compare", "Compare tea and coffee in a table: taste, caffeine, preparation."],
];
const BEGINNINGS = [
  ["Story", "Once upon a time, in a village by the sea,"],
  ["Fact", "The capital of France is"],
  ["List", "The three primary colours are"],
  ["Letter", "Dear Anna,\n\nthank you for"],
];

/** What stands where no message is yet. `take(text)` puts a suggestion into the box. */
export function showWelcome(place, shown, server, take) {
  place.hidden = !shown;
  if (!shown) return;
  const base = server.isBase;
  const examples = (base ? BEGINNINGS : QUESTIONS).map(([name, text]) =>
    h("button", { type: "button", class: "example", on: { click: () => take(text) } }, h("strong", {}, name), h("span", {}, text)),
  );
  const said = base
    ? `${server.model.id} is a base model: it continues texts and was not tuned to answer. To talk, serve a model whose name ends in -it.`
    : "Conversations stay in this browser. The server keeps none.";
  place.replaceChildren(
    h("div", { class: "mark" }, icon("gem")),
    h("h2", {}, base ? "What shall it continue?" : "What would you like to know?"),
    h("p", {}, said),
    h("div", { class: "examples" }, ...examples),
  );
}
