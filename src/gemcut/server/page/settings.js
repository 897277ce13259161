// Sampling settings: what they are called, their bounds, the dialog that changes them, and where they are kept.

import { byId, h } from "./dom.js";
import { remember, remembered } from "./local.js";

const KEY = "gemcut-sampling";
const MAX_STOPS = 4;

/** Each field: its name in a request and in the server's defaults, its bounds (`above`: larger than `min`). */
const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.1, hint: "0 takes the likeliest token." },
  { name: "max_tokens", label: "Longest answer", min: 1, step: 1, hint: "In tokens." },
  { name: "top_p", label: "Top p", min: 0, above: true, max: 1, step: 0.05, hint: "Keep the likeliest up to this." },
  { name: "top_k", label: "Top k", min: 0, step: 1, hint: "Keep so many tokens; 0 all." },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, hint: "Drop below this × the likeliest." },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0, above: true, max: 10, step: 0.05,
    hint: "Above 1: repeat less." },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, hint: "Once per token used." },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, hint: "Each time it was used." },
  { name: "seed", label: "Seed", step: 1, hint: "Repeats an answer. Empty: another each time." },
];

/** What was chosen and kept; whatever is not valid is dropped. */
export function readSettings() {
  let kept;
  try {
    kept = JSON.parse(remembered(KEY) || "{}");
  } catch {
    return {};
  }
  if (typeof kept !== "object" || kept === null) return {};
  const settings = {};
  for (const field of FIELDS) {
    if (Object.hasOwn(kept, field.name) && !problem(field, kept[field.name])) settings[field.name] = kept[field.name];
  }
  const stops = Array.isArray(kept.stop) ? kept.stop.filter((text) => typeof text === "string" && text) : [];
  if (stops.length) settings.stop = stops.slice(0, MAX_STOPS);
  return settings;
}

/** What is wrong with a value, in words; "" where nothing is. */
function problem({ min = -Infinity, max = Infinity, above, step, label }, value) {
  const whole = step === 1;
  if (typeof value !== "number" || !Number.isFinite(value)) return `${label} must be a number.`;
  if (whole && !Number.isSafeInteger(value)) return `${label} must be a whole number.`;
  if (value < min || value > max || (above && value === min)) {
    if (max === Infinity) return `${label} must be at least ${min}.`;
    return `${label} must be ${above ? "above" : "from"} ${min} ${above ? "up to" : "to"} ${max}.`;
  }
  return "";
}

/** The dialog. `saved({settings, system})` is called with what the person saved. */
export class SettingsDialog {
  constructor(saved) {
    this.dialog = byId("settings");
    this.inputs = new Map();
    for (const field of FIELDS) this.addField(field);
    this.addStops();
    byId("settings-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const settings = this.read();
      if (!settings) return;
      remember(KEY, JSON.stringify(settings));
      this.dialog.close();
      saved({ settings, system: byId("system").value });
    });
    byId("settings-reset").addEventListener("click", () => {
      for (const input of this.inputs.values()) input.value = "";
    });
  }

  addField(field) {
    const id = `field-${field.name}`;
    const input = h("input", {
      id, type: "number", min: field.min, max: field.max, step: field.step === 1 ? 1 : "any",
      inputmode: field.min === -2 ? "text" : "decimal", "aria-describedby": `${id}-hint ${id}-error`,
    });
    this.inputs.set(field.name, input);
    byId("fields").append(
      h("div", { class: "field" },
        h("label", { for: id }, field.label), input,
        h("p", { id: `${id}-hint`, class: "hint" }, field.hint),
        h("p", { id: `${id}-error`, class: "error", role: "alert" })),
    );
  }

  addStops() {
    const area = h("textarea", { id: "field-stop", rows: 2, "aria-describedby": "field-stop-hint field-stop-error" });
    this.inputs.set("stop", area);
    byId("fields").append(
      h("div", { class: "field whole" },
        h("label", { for: "field-stop" }, "Stop texts"), area,
        h("p", { id: "field-stop-hint", class: "hint" }, `One a line, at most ${MAX_STOPS}. An answer ends before them.`),
        h("p", { id: "field-stop-error", class: "error", role: "alert" })),
    );
  }

  /** Show it; `defaults` are the server's, by name. */
  open(settings, defaults, system) {
    byId("system").value = system;
    for (const field of FIELDS) {
      const input = this.inputs.get(field.name);
      input.value = settings[field.name] ?? "";
      const given = defaults[field.name];
      input.placeholder = typeof given === "number" ? String(given) : field.name === "seed" ? "random" : "default";
      this.mark(field.name, "");
    }
    this.inputs.get("stop").value = (settings.stop || []).join("\n");
    this.mark("stop", "");
    this.dialog.showModal();
  }

  /** The settings as they stand in the dialog, or null where one is wrong and marked. */
  read() {
    const settings = {};
    let wrong = null;
    for (const field of FIELDS) {
      const input = this.inputs.get(field.name);
      const empty = input.value.trim() === "" && !input.validity.badInput;
      const found = empty ? "" : problem(field, input.validity.badInput ? NaN : Number(input.value));
      this.mark(field.name, found);
      if (found) wrong ||= input;
      else if (!empty) settings[field.name] = Number(input.value);
    }
    const stops = this.inputs.get("stop").value.split("\n").filter(Boolean);
    const many = stops.length > MAX_STOPS ? `At most ${MAX_STOPS} stop texts; ${stops.length} are here.` : "";
    this.mark("stop", many);
    if (many) wrong ||= this.inputs.get("stop");
    else if (stops.length) settings.stop = stops;
    if (wrong) wrong.focus();
    return wrong ? null : settings;
  }

  mark(name, text) {
    const input = this.inputs.get(name);
    byId(`field-${name}-error`).textContent = text;
    if (text) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
  }
}
