// The list of conversations at the side: open, search, rename, delete, export.

import { matches } from "./conversation.js";
import { button, byId, h } from "./dom.js";

const DAY = 24 * 60 * 60 * 1000;

export class ConversationList {
  /** `does`: {open(id), rename(id, title), remove(id), exportOne(id)}. */
  constructor(does) {
    this.does = does;
    this.element = byId("list");
    this.search = byId("search");
  }

  /** Show those that match what is searched for; `current` is the open one's id. */
  show(conversations, current) {
    const query = this.search.value.trim();
    const found = query ? conversations.filter((one) => matches(one, query)) : conversations;
    this.element.replaceChildren();
    if (!found.length) {
      const text = query ? `Nothing holds “${query}”.` : "Your conversations will be here. They stay in this browser.";
      this.element.append(h("p", { class: "none" }, text));
      return;
    }
    for (const [name, group] of grouped(found)) {
      const items = group.map((one) => this.item(one, one.id === current));
      this.element.append(h("section", { "aria-label": name }, h("h2", {}, name), h("ul", {}, ...items)));
    }
  }

  item(conversation, current) {
    const { id, title } = conversation;
    const open = h(
      "button",
      {
        type: "button",
        class: "open",
        title,
        "aria-current": current ? "page" : null,
        on: { click: () => this.does.open(id), dblclick: () => this.edit(item, conversation) },
      },
      title || "Untitled",
    );
    const tools = h(
      "span",
      { class: "tools" },
      button("edit", `Rename ${title}`, () => this.edit(item, conversation), { class: "quiet" }),
      button("export", `Export ${title}`, () => this.does.exportOne(id), { class: "quiet" }),
      button("trash", `Delete ${title}`, () => this.does.remove(id), { class: "quiet" }),
    );
    const item = h("li", { class: current ? "current" : null, "data-id": id }, open, tools);
    return item;
  }

  /** Put a box in the place of a title. Enter or leaving it renames, Escape does not. */
  edit(item, { id, title }) {
    const input = h("input", { type: "text", "aria-label": "New title", maxlength: 200 });
    input.value = title;
    let done = false;
    const end = (keep) => {
      if (done) return;
      done = true;
      this.does.rename(id, keep && input.value.trim() ? input.value.trim() : title);
      this.focus(id);
    };
    input.addEventListener("blur", () => end(true));
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      end(event.key === "Enter");
    });
    item.replaceChildren(input);
    input.select();
  }

  focus(id) {
    const item = [...this.element.querySelectorAll("li")].find((one) => one.dataset.id === id);
    if (item) item.querySelector("button").focus();
  }
}

function grouped(conversations) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const groups = new Map();
  for (const one of conversations) {
    let name = "Older";
    if (one.updated >= midnight) name = "Today";
    else if (one.updated >= midnight - DAY) name = "Yesterday";
    else if (one.updated >= midnight - 30 * DAY) name = "Last 30 days";
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(one);
  }
  return groups;
}
