// Short notices in a corner: what went wrong, and what can be done about it.

import { button, byId, h } from "./dom.js";

const MAX_SHOWN = 4;
const SECONDS = 8;

/** Show a notice. `actions`: [{label, run}]. Errors stay until they are closed, others for some seconds. */
export function toast(text, { error = false, actions = [] } = {}) {
  const place = byId("toasts");
  const message = h("p", {}, text);
  const close = button("close", "Close", () => element.remove(), { class: "quiet" });
  const row = h("div", { class: "row" });
  const options = { class: error ? "toast wrong" : "toast", role: error ? "alert" : "status" };
  const element = h("div", options, message, close, row);
  for (const { label, run } of actions) {
    const click = () => {
      element.remove();
      run();
    };
    row.append(h("button", { type: "button", on: { click } }, label));
  }
  while (place.children.length >= MAX_SHOWN) place.firstChild.remove();
  place.append(element);
  if (!error) setTimeout(() => element.remove(), SECONDS * 1000);
  return element;
}

/** A message as a sentence, whoever wrote it. */
export function sentence(text) {
  const trimmed = text.trim();
  return `${trimmed.slice(0, 1).toUpperCase()}${trimmed.slice(1)}${/[.!?…]$/.test(trimmed) ? "" : "."}`;
}
