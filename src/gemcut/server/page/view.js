// The messages of a conversation on the screen.

import { path, siblings } from "./conversation.js";
import { announce, button, byId, copyText, h } from "./dom.js";
import { MarkdownView } from "./render.js";

const NEAR_END = 90; // pixels: whoever is so near to the end wants to stay there

const NOTES = {
  length: "The answer reached its longest length.",
  stopped: "Stopped.",
  cut: "The answer was cut off.",
  error: "The answer ended with an error.",
  content_filter: "The server's guard ended this answer.",
};

export class LogView {
  /** `does`: {edit(message, text, send), retry(message), resume(message), choose(message), report(message),
   * mayReport()}. */
  constructor(does) {
    this.does = does;
    this.log = byId("log");
    this.scroller = byId("scroll");
    this.down = byId("down");
    this.parts = new Map(); // by a message's id: {element, view, note}
    this.pinned = true;
    this.frame = 0;
    this.scroller.addEventListener("scroll", () => this.scrolled(), { passive: true });
    this.down.addEventListener("click", () => {
      this.pinned = true;
      this.follow();
    });
  }

  /** Show a conversation's path. `busy`: the id of the message that is being written, or null. */
  show(conversation, busy) {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.parts.clear();
    const messages = path(conversation);
    const elements = messages.map((message, i) => this.message(conversation, message, i === messages.length - 1, busy));
    this.log.replaceChildren(...elements);
    this.follow();
  }

  message(conversation, message, last, busy) {
    const user = message.role === "user";
    const body = h("div", { class: "body" });
    const note = h("p", { class: "note", hidden: true });
    const tools = h("div", { class: "tools" });
    const name = user ? "You" : message.model || "Model";
    const who = h("h2", { class: user ? "sr-only" : "who" }, name);
    const element = h("article", { class: `message ${message.role}`, "data-id": message.id }, who, body, note, tools);
    const part = { element, body, note, tools, view: null };
    this.parts.set(message.id, part);
    if (user) {
      body.textContent = message.text;
    } else {
      part.view = new MarkdownView(body);
      part.view.update(message.text, message.id !== busy);
      this.tell(message, part, message.id === busy);
    }
    this.addTools(conversation, message, part, last, busy);
    return element;
  }

  addTools(conversation, message, { tools }, last, busy) {
    const same = siblings(conversation, message);
    const at = same.indexOf(message);
    if (same.length > 1) {
      const go = (to) => () => this.does.choose(same[to]);
      const off = (to) => (busy || to < 0 || to >= same.length ? { disabled: true } : {});
      tools.append(
        h("span", { class: "versions", role: "group", "aria-label": "Versions" },
          button("left", "Earlier version", go(at - 1), { class: "quiet", ...off(at - 1) }),
          h("span", { class: "which" }, `${at + 1}/${same.length}`),
          button("right", "Later version", go(at + 1), { class: "quiet", ...off(at + 1) })),
      );
    }
    const copy = button("copy", "Copy", async () => {
      announce((await copyText(message.text)) ? "Copied" : "Copying was refused");
      copy.classList.add("done");
      setTimeout(() => copy.classList.remove("done"), 1200);
    }, { class: "quiet" });
    tools.append(copy);
    if (busy) return;
    tools.append(button("edit", "Edit", () => this.edit(message), { class: "quiet", "data-do": "edit" }));
    if (message.role === "assistant") {
      tools.append(button("retry", "Try again", () => this.does.retry(message), { class: "quiet", "data-do": "retry" }));
    } else if (last) {
      tools.append(button("retry", "Answer this", () => this.does.retry(message), { class: "quiet", "data-do": "retry" }));
    }
    if (message.role === "assistant" && message.request && this.does.mayReport()) {
      tools.append(button("flag", "Report this answer", () => this.does.report(message), { class: "quiet", "data-do": "report" }));
    }
    if (last && message.role === "assistant" && message.text) {
      const resume = () => this.does.resume(message);
      tools.append(button("continue", "Continue", resume, { class: "quiet", "data-do": "continue", text: true }));
    }
    if (message.stats?.completion) tools.append(h("span", { class: "stats" }, statsText(message.stats)));
  }

  /** Show what a message has come to: a piece more, or its end. Many pieces within a frame are drawn once. */
  update(message) {
    this.pending = message;
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      const part = this.parts.get(this.pending.id);
      if (!part) return;
      part.view.update(this.pending.text, false);
      this.tell(this.pending, part, true);
      this.follow();
    });
  }

  /** Put a word under an answer that is being waited for. */
  waiting(message, text) {
    const part = this.parts.get(message.id);
    if (!part || part.waiting === text) return;
    part.waiting = text;
    part.note.textContent = text;
    part.note.hidden = !text;
  }

  tell(message, part, busy) {
    part.element.classList.toggle("busy", busy);
    part.element.setAttribute("aria-busy", String(busy));
    if (busy) {
      if (message.text) this.waiting(message, "");
      return;
    }
    const note = NOTES[message.finish] || (message.finish === "" ? NOTES.cut : "");
    part.note.textContent = message.finish === "stop" && !message.text ? "The answer is empty." : note;
    part.note.hidden = !part.note.textContent;
  }

  /** Let a person change a message in its place. */
  edit(message) {
    const part = this.parts.get(message.id);
    if (!part || part.element.classList.contains("editing")) return;
    const area = h("textarea", { "aria-label": message.role === "user" ? "Your message" : "The answer", rows: 3 });
    area.value = message.text;
    const end = () => {
      form.remove();
      part.element.classList.remove("editing");
      part.tools.querySelector('[data-do="edit"]')?.focus();
    };
    const finish = (send) => {
      const text = area.value;
      if (!text.trim()) {
        area.focus();
        return;
      }
      end();
      this.does.edit(message, text, send);
    };
    const buttons = [h("button", { type: "button", class: "quiet", on: { click: end } }, "Cancel")];
    const save = { type: "button", title: "Change the text and ask nothing", on: { click: () => finish(false) } };
    if (message.role === "user") {
      buttons.push(h("button", save, "Save only"));
      buttons.push(h("button", { type: "button", class: "primary", on: { click: () => finish(true) } }, "Send"));
    } else {
      buttons.push(h("button", { ...save, class: "primary" }, "Save"));
    }
    const form = h("div", { class: "editor" }, area, h("div", { class: "row" }, ...buttons));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") end();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) finish(message.role === "user");
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    area.addEventListener("input", () => grow(area));
    part.element.classList.add("editing");
    part.body.before(form);
    grow(area);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.pinned = scrollHeight - scrollTop - clientHeight < NEAR_END;
    this.down.hidden = this.pinned;
  }

  follow() {
    if (this.pinned) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.down.hidden = this.pinned;
  }
}

/** A box as high as its text, up to what the style sheet allows. */
export function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

function statsText({ completion, speed }) {
  const tokens = `${completion.toLocaleString("en")} token${completion === 1 ? "" : "s"}`;
  return speed ? `${tokens} · ${speedText(speed)}` : tokens;
}

export function speedText(speed) {
  return `${speed < 100 ? speed.toFixed(1) : Math.round(speed).toLocaleString("en")} tokens/s`;
}
