// Keyboard shortcuts, and the sheet that lists them. Letters go by their place on the keyboard (event.code).

import { byId, h } from "./dom.js";

const MAC = /Mac|iPhone|iPad/.test(navigator.platform);
const CTRL = MAC ? "⌘" : "Ctrl";
const ALT = MAC ? "⌥" : "Alt";

/** [keys as they are shown, what it does, name of the action or "" for what the boxes do themselves, test] */
const alt = (code) => (event) => event.altKey && !event.ctrlKey && !event.metaKey && event.code === code;
const ctrl = (key) => (event) => (event.ctrlKey || event.metaKey) && !event.altKey && event.key.toLowerCase() === key;
const SHORTCUTS = [
  [["Enter"], "Send the message", ""],
  [["Shift", "Enter"], "New line", ""],
  [["Esc"], "Stop the answer", ""],
  [["↑"], "Edit your last message (in an empty box)", ""],
  [[ALT, "N"], "New conversation", "new", alt("KeyN")],
  [[ALT, "R"], "Try the last answer again", "retry", alt("KeyR")],
  [[ALT, "C"], "Continue the last answer", "resume", alt("KeyC")],
  [[ALT, "Y"], "Copy the last answer", "copy", alt("KeyY")],
  [[CTRL, "K"], "Search conversations", "search", ctrl("k")],
  [[ALT, "B"], "Show or hide conversations", "side", alt("KeyB")],
  [[ALT, "S"], "Settings", "settings", alt("KeyS")],
  [[ALT, "T"], "Theme: system, light, dark", "theme", alt("KeyT")],
  [[CTRL, "/"], "This sheet", "help", ctrl("/")],
];

/** Listen for shortcuts; `does` has a function for each action, and `escape`. */
export function listenForKeys(does) {
  const list = byId("shortcuts");
  for (const [keys, text] of SHORTCUTS) {
    const shown = keys.flatMap((key, i) => (i ? [" + ", h("kbd", {}, key)] : [h("kbd", {}, key)]));
    list.append(h("div", {}, h("dt", {}, ...shown), h("dd", {}, text)));
  }
  document.addEventListener("keydown", (event) => {
    if (event.isComposing || event.repeat) return;
    const dialog = document.querySelector("dialog[open]");
    if (event.key === "Escape" && !dialog) {
      if (does.escape()) event.preventDefault();
      return;
    }
    const found = SHORTCUTS.find(([, , name, test]) => name && test(event));
    if (!found || dialog) return;
    event.preventDefault();
    does[found[2]]();
  });
}
