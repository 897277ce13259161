// The page: brings the parts together. What a person does comes in here, and goes out to store, server and screen.

import { Answer } from "./answer.js";
import { getKey, setKey } from "./api.js";
import { addMessage, findMessage, newConversation, path, removeMessage, show, titleOf, toMessages, toText, touch } from "./conversation.js";
import { announce, byId, copyText, h } from "./dom.js";
import { showContext, showSpeed, showWelcome } from "./facts.js";
import { exportAll, exportChat, importFile } from "./files.js";
import { listenForKeys } from "./keys.js";
import { ConversationList } from "./list.js";
import { ReportDialog } from "./report.js";
import { Server } from "./server.js";
import { readSettings, SettingsDialog } from "./settings.js";
import { Side } from "./side.js";
import { Store } from "./store.js";
import { sentence, toast } from "./toasts.js";
import { grow, LogView } from "./view.js";

const SAVE_EVERY = 1000; // milliseconds, while an answer is written
const BASE_TOKENS = 200; // of a base model, which ends nowhere, unless the person says otherwise

class App {
  constructor() {
    this.store = new Store();
    this.settings = readSettings();
    this.current = newConversation();
    this.answer = null; // the one that is being written
    this.left = false; // whether the person went to another page; some of this one's code may still run
    this.savedAt = -SAVE_EVERY; // performance.now() of the last time that the answer was kept
    this.box = byId("box");
    this.server = new Server(() => this.showServer());
    this.view = new LogView({
      edit: (message, text, send) => this.edit(message, text, send),
      retry: (message) => this.retry(message),
      resume: (message) => this.resume(message),
      choose: (message) => this.choose(message),
      report: (message) => this.report.ask(message, findMessage(this.current, message.parent)),
      mayReport: () => this.server.takesReports,
    });
    this.list = new ConversationList({
      open: (id) => this.open(id),
      rename: (id, title) => this.rename(id, title),
      remove: (id) => this.remove(id),
      exportOne: (id) => exportChat(this.store.get(id), this.server.model?.id || ""),
    });
    this.side = new Side();
    this.report = new ReportDialog();
    this.dialog = new SettingsDialog(({ settings, system }) => this.saveSettings(settings, system));
  }

  async start() {
    this.listen();
    this.server.watch();
    await this.store.open();
    if (!this.store.persistent) toast("This browser keeps nothing here: conversations last until the page is closed.");
    this.store.onchange = (id) => this.changedElsewhere(id);
    const wanted = this.store.get(location.hash.slice(1));
    if (wanted) this.open(wanted.id);
    else this.showAll();
    this.box.focus();
  }

  listen() {
    const on = (id, event, run) => byId(id).addEventListener(event, run);
    on("composer", "submit", (event) => {
      event.preventDefault();
      this.send();
    });
    on("stop", "click", () => this.stop());
    on("new", "click", () => this.startNew());
    on("search", "input", () => this.showList());
    on("settings-open", "click", () => this.openSettings());
    on("theme", "click", () => this.nextTheme());
    on("help-open", "click", () => byId("help").showModal());
    on("export", "click", () => exportAll(this.store.all()));
    on("import", "click", () => byId("file").click());
    on("file", "change", () => importFile(byId("file"), this.store, (one) => this.imported(one)));
    on("key-forget", "click", () => {
      setKey("");
      byId("key-row").hidden = true;
    });
    on("box", "input", () => this.typed());
    on("box", "keydown", (event) => this.boxKey(event));
    for (const close of document.querySelectorAll("[data-close]")) {
      close.addEventListener("click", () => close.closest("dialog").close());
    }
    window.addEventListener("pagehide", () => {
      this.left = true;
      this.leaving();
    });
    window.addEventListener("pageshow", () => (this.left = false)); // back, as it was
    // A telephone ends a page in the background without a word.
    document.addEventListener("visibilitychange", () => document.hidden && this.leaving());
    window.addEventListener("hashchange", () => {
      const id = location.hash.slice(1);
      if (id !== this.current.id && this.store.get(id)) this.open(id);
    });
    listenForKeys({
      new: () => this.startNew(),
      retry: () => this.onLast("assistant", (message) => this.retry(message)),
      resume: () => this.onLast("assistant", (message) => this.resume(message)),
      copy: () => this.onLast("assistant", async ({ text }) => announce((await copyText(text)) ? "Copied" : "Not copied")),
      search: () => {
        this.side.open();
        byId("search").focus();
      },
      side: () => this.side.toggle(),
      settings: () => this.openSettings(),
      theme: () => this.nextTheme(),
      help: () => byId("help").showModal(),
      escape: () => this.side.closeDrawer() || this.stop(),
    });
  }

  boxKey(event) {
    if (event.isComposing) return; // Enter chooses a character there
    const touch = matchMedia("(pointer: coarse)").matches; // there Enter is a new line, the button sends
    if (event.key === "Enter" && !event.shiftKey && !event.altKey && !touch) {
      event.preventDefault();
      this.send();
    } else if (event.key === "ArrowUp" && !this.box.value && !this.answer) {
      const last = path(this.current).findLast(({ role }) => role === "user");
      if (!last) return;
      event.preventDefault();
      this.view.edit(last);
    }
  }

  typed() {
    grow(this.box);
    byId("send").disabled = !this.box.value.trim();
  }

  // What is on the screen

  showAll() {
    this.view.show(this.current, this.busyId());
    this.showFrame();
    showWelcome(byId("welcome"), !this.current.messages.length, this.server, (text) => {
      this.box.value = text;
      this.typed();
      this.box.focus();
    });
  }

  showFrame() {
    const { title } = this.current;
    byId("title").textContent = title || "New conversation";
    document.title = title ? `${title} · gemcut` : "gemcut";
    byId("send").hidden = Boolean(this.answer);
    byId("stop").hidden = !this.answer;
    if (document.activeElement === document.body) this.focusBox(); // what had the focus is gone
    this.typed();
    this.showList();
    this.showFacts();
  }

  showList() {
    this.list.show(this.store.all(), this.current.id);
  }

  showFacts() {
    const here = this.answer?.conversation === this.current ? this.answer : null;
    showContext(path(this.current), here, this.server.context);
    showSpeed(path(this.current), here);
  }

  showServer() {
    const banner = byId("banner");
    banner.textContent = this.server.banner();
    banner.hidden = !banner.textContent;
    banner.dataset.state = this.server.state;
    const chip = byId("model");
    const { model } = this.server;
    chip.hidden = !model;
    if (model) {
      chip.replaceChildren(model.id, ...(this.server.isBase ? [h("span", { class: "base" }, "base model")] : []));
      chip.title = this.server.isBase ? "A base model continues texts; it was not tuned to answer." : model.root || model.id;
    }
    this.showAll();
  }

  busyId() {
    return this.answer?.conversation === this.current ? this.answer.message.id : null;
  }

  // Conversations

  open(id) {
    const found = this.store.get(id);
    if (!found) return;
    this.current = found;
    const last = path(found).at(-1); // the page was left before the first piece came
    if (last?.role === "assistant" && !last.text && this.answer?.message !== last && last.finish !== "stop") {
      removeMessage(found, last);
    }
    history.replaceState(null, "", `#${id}`);
    this.view.pinned = true;
    this.showAll();
    this.side.closeDrawer();
    this.focusBox();
  }

  /** To the box, but on no touch screen: a keyboard would cover half of it. */
  focusBox() {
    if (!matchMedia("(pointer: coarse)").matches) this.box.focus();
  }

  startNew() {
    this.current = newConversation();
    history.replaceState(null, "", location.pathname + location.search);
    this.showAll();
    this.side.closeDrawer();
    this.box.focus();
  }

  rename(id, title) {
    const found = this.store.get(id);
    if (found && found.title !== title) {
      found.title = title;
      this.keep(found);
    }
    this.showFrame();
  }

  async remove(id) {
    const found = this.store.get(id);
    if (!found) return;
    if (this.answer?.conversation === found) this.stop();
    await this.store.remove(id);
    if (this.current.id === id) this.startNew();
    else this.showList();
    const restore = async () => {
      await this.keep(found);
      this.open(id);
    };
    toast(`“${found.title || "Untitled"}” was deleted.`, { actions: [{ label: "Undo", run: restore }] });
  }

  changedElsewhere(id) {
    if (this.answer?.conversation.id === id) return; // this tab writes in it, and its state counts
    if (id === this.current.id && this.store.get(id)) this.open(id);
    else this.showList();
  }

  /** Conversations came from a file: `one` is the only one, or null. */
  imported(one) {
    if (one) this.open(one.id);
    else this.showList();
  }

  /** Keep what has come of an answer: the page may end here. One that was deleted meanwhile stays so. */
  leaving() {
    if (this.answer && this.store.get(this.answer.conversation.id)) this.keep(this.answer.conversation);
  }

  async keep(conversation) {
    try {
      await this.store.save(conversation);
    } catch (error) {
      toast(`The conversation could not be kept: ${error.message || error.name}.`, { error: true });
    }
  }

  // Questions and answers

  send() {
    const text = this.box.value.trim();
    if (!text || this.answer) return;
    this.box.value = "";
    this.ask(text, this.current.leaf);
  }

  /** Put a question below `parent` and have it answered. */
  ask(text, parent) {
    const question = addMessage(this.current, parent, "user", text);
    history.replaceState(null, "", `#${this.current.id}`);
    this.respond(question);
  }

  respond(question) {
    this.write(addMessage(this.current, question.id, "assistant", ""), false);
  }

  /** Another answer to the same question; the one there stays as a version. */
  retry(message) {
    if (this.answer) return;
    const question = message.role === "user" ? message : findMessage(this.current, message.parent);
    if (question) this.respond(question);
  }

  /** Go on where an answer ended. */
  resume(message) {
    if (!this.answer && message.text) this.write(message, true);
  }

  edit(message, text, send) {
    if (this.answer) return;
    if (send) {
      this.ask(text.trim(), message.parent);
      return;
    }
    if (message.parent === null && this.current.title === titleOf(message.text)) this.current.title = titleOf(text);
    message.text = text;
    message.stats = null; // they were another text's
    touch(this.current);
    this.keep(this.current);
    this.showAll();
  }

  choose(message) {
    show(this.current, message);
    this.keep(this.current);
    this.showAll();
  }

  stop() {
    if (!this.answer) return false;
    this.answer.stop();
    return true;
  }

  /** Have `message` written, or continued. */
  async write(message, continued) {
    const conversation = this.current;
    const messages = toMessages(conversation, message.id);
    const prompt = toText(conversation, message.id);
    const body = () => {
      const model = this.server.model.id;
      if (this.server.isBase) return { model, prompt, max_tokens: BASE_TOKENS, ...this.settings };
      const more = continued ? { continue_final_message: true } : {};
      return { model, messages, ...this.settings, ...more };
    };
    const answer = new Answer(conversation, message, body, () => this.server.ready(), {
      changed: () => this.progress(answer),
      waiting: (text) => this.view.waiting(message, text),
    });
    this.answer = answer;
    this.savedAt = -SAVE_EVERY; // the first piece is kept when it comes
    this.view.pinned = true;
    this.keep(conversation);
    this.showAll();
    announce("The model is answering");
    let failure = null;
    try {
      await answer.run();
    } catch (error) {
      failure = error;
    }
    message.model = this.server.model?.id || message.model;
    this.ended(answer, failure);
  }

  progress(answer) {
    this.view.update(answer.message);
    const now = performance.now();
    if (now - this.savedAt < SAVE_EVERY) return;
    this.savedAt = now;
    this.showFacts();
    this.keep(answer.conversation);
  }

  ended(answer, failure) {
    const { conversation, message } = answer;
    this.answer = null;
    if (this.left && message.finish === "error") message.finish = "cut"; // the browser broke the connection
    const empty = !message.text && message.finish !== "stop" && message.finish !== "length";
    if (empty) removeMessage(conversation, message); // its question stays, and can be answered
    touch(conversation);
    if (this.store.get(conversation.id)) this.keep(conversation);
    if (this.current === conversation) this.showAll();
    else this.showFrame();
    announce({ stopped: "Stopped", error: "The answer failed" }[message.finish] || "The answer is complete");
    if (failure) this.explain(failure, conversation, message);
  }

  explain(failure, conversation, message) {
    this.server.doubt(failure);
    const again = () => {
      if (this.current !== conversation) this.open(conversation.id);
      this.retry(findMessage(conversation, message.id) || findMessage(conversation, message.parent));
    };
    let text = sentence(failure.message);
    if (failure.code === "context_length_exceeded") text += " Start a new conversation, or edit an earlier message.";
    if (failure.retryAfter) text += ` Try again in ${failure.retryAfter} s.`;
    toast(text, { error: true, actions: [{ label: "Try again", run: again }] });
  }

  onLast(role, run) {
    const message = path(this.current).findLast((one) => one.role === role);
    if (message && !this.answer) run(message);
  }

  // Settings and looks

  openSettings() {
    byId("key-row").hidden = !getKey();
    this.dialog.open(this.settings, this.server.defaults, this.current.system);
  }

  saveSettings(settings, system) {
    this.settings = settings;
    if (this.current.system !== system) {
      this.current.system = system;
      if (this.store.get(this.current.id)) this.keep(this.current);
    }
    announce("Settings saved");
  }

  nextTheme() {
    const name = window.gemcutTheme.next();
    toast(`Theme: ${{ system: "as the system", light: "light", dark: "dark" }[name]}`);
  }
}

new App().start();
