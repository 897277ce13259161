// A report of misuse: what a person says of an answer. The texts go with it only where they say so.

import { sendReport } from "./api.js";
import { byId, h } from "./dom.js";
import { sentence, toast } from "./toasts.js";

const REASONS = [
  ["dangerous-content", "Dangerous content"],
  ["harassment", "Harassment"],
  ["hate", "Hate"],
  ["sexual-content", "Sexual content"],
  ["child-safety", "Child safety"],
  ["violence", "Violence"],
  ["self-harm", "Self-harm"],
  ["privacy", "Somebody's private data"],
  ["wrong-or-misleading", "Wrong or misleading"],
  ["other", "Something else"],
];
const MAX_COMMENT = 4000;
const MAX_TEXT = 20_000;

/** Asks what is wrong with an answer, and sends that. */
export class ReportDialog {
  constructor() {
    this.dialog = byId("report");
    this.reason = byId("report-reason");
    this.comment = byId("report-comment");
    this.include = byId("report-include");
    this.comment.maxLength = MAX_COMMENT;
    this.reason.append(...REASONS.map(([value, label]) => h("option", { value }, label)));
    byId("report-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
  }

  /** `message` is the assistant's, `question` the one that it answers, or null. */
  ask(message, question) {
    this.about = message;
    this.texts = [question?.text || "", message.text].filter(Boolean).join("\n\n").slice(0, MAX_TEXT);
    this.comment.value = "";
    this.include.checked = false;
    byId("report-error").textContent = "";
    this.dialog.showModal();
    this.reason.focus();
  }

  async send() {
    const body = { request_id: this.about.request, reason: this.reason.value };
    if (this.comment.value.trim()) body.comment = this.comment.value.trim();
    if (this.include.checked) body.text = this.texts;
    try {
      await sendReport(body);
    } catch (failure) {
      byId("report-error").textContent = sentence(failure.message); // the dialog stays, with what was typed
      return;
    }
    this.dialog.close();
    toast("Your report was taken down. Thank you.");
  }
}
