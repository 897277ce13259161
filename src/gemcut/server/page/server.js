// What the page knows of the server: ready or not, its model, the key. Asks again while something is amiss.

import { ApiFailure, getKey, readiness, servedModel, setKey } from "./api.js";
import { byId } from "./dom.js";

const POLL = 1000; // milliseconds between two questions; while nobody answers ever longer, up to
const MAX_POLL = 8000;

export class Server {
  /** `changed()` is called when something of this changes. */
  constructor(changed) {
    this.changed = changed;
    this.model = null; // of /v1/models
    this.state = "unknown"; // ready, loading, draining, away, locked (a key is missing)
    this.waiters = [];
    this.running = false;
    this.keyDialog = new KeyDialog((given) => {
      if (given) this.watch();
      else this.set("locked", "");
    });
  }

  /** Resolves when requests can be answered. */
  ready() {
    if (this.state === "ready") return Promise.resolve();
    this.watch();
    return new Promise((resolve) => this.waiters.push(resolve));
  }

  /** Something went wrong that the server's state may explain: look at it. */
  doubt(failure) {
    if (failure instanceof ApiFailure && failure.status === 401) this.lock(getKey() !== "");
    else if (!(failure instanceof ApiFailure) || failure.status === 0 || failure.status === 503) this.watch();
  }

  /** Ask until the server is ready. */
  async watch() {
    if (this.running) return;
    this.running = true;
    let pause = POLL;
    for (;;) {
      const { state, stage } = await readiness();
      if (state === "ready") {
        if (await this.learn()) break;
      } else {
        this.set(state, stage);
      }
      if (this.state === "locked") break;
      pause = state === "away" ? Math.min(MAX_POLL, pause * 1.5) : POLL;
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
    this.running = false;
  }

  /** Ask which model there is; whether that is known now. */
  async learn() {
    try {
      this.model = await servedModel();
    } catch (failure) {
      if (failure.status === 401) this.lock(getKey() !== "");
      else this.set("away", failure.message);
      return false;
    }
    this.set("ready", "");
    for (const resolve of this.waiters.splice(0)) resolve();
    return true;
  }

  lock(wrong) {
    this.set("locked", "");
    this.keyDialog.ask(wrong);
  }

  set(state, stage) {
    if (state === this.state && stage === this.stage) return;
    this.state = state;
    this.stage = stage;
    this.changed();
  }

  /** One line about what is amiss; "" where all is well. */
  banner() {
    switch (this.state) {
      case "loading":
        return `The model is loading${this.stage ? `: ${this.stage}` : ""}. You can write already; it answers when it is ready.`;
      case "draining":
        return "The server is shutting down.";
      case "away":
        return this.stage || "The server cannot be reached. Trying again…";
      case "locked":
        return "This server asks for an API key.";
      default:
        return "";
    }
  }

  get context() {
    return Number.isFinite(this.model?.max_model_len) ? this.model.max_model_len : 0;
  }

  /** The server's sampling, by a request's names. */
  get defaults() {
    const given = this.model?.sampling_defaults;
    const defaults = typeof given === "object" && given !== null ? { ...given } : {};
    defaults.max_tokens ??= defaults.max_new_tokens;
    return defaults;
  }

  /** Whether reports of misuse are taken. */
  get takesReports() {
    const can = this.model?.capabilities;
    return Array.isArray(can) && can.includes("reports");
  }

  /** A model that continues texts: it was not tuned to answer. */
  get isBase() {
    return this.model?.instruction_tuned === false;
  }
}

class KeyDialog {
  constructor(answered) {
    this.dialog = byId("key");
    this.input = byId("key-text");
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      const key = this.input.value.trim();
      if (!key || /[^\x21-\x7e]/.test(key)) {
        byId("key-error").textContent = key ? "A key has letters, digits and signs only." : "Type the key first.";
        this.input.focus();
        return;
      }
      setKey(key);
      this.input.value = "";
      this.dialog.close("given");
    });
    this.dialog.addEventListener("close", () => {
      answered(this.dialog.returnValue === "given");
      this.dialog.returnValue = "";
    });
  }

  ask(wrong) {
    if (this.dialog.open) return;
    if (wrong) setKey("");
    byId("key-error").textContent = wrong ? "The server did not take the key." : "";
    this.dialog.showModal();
    this.input.focus();
  }
}
