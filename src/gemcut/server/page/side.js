// The side with the conversations: beside the page, or a drawer over it where the screen is narrow.

import { byId } from "./dom.js";
import { remember, remembered } from "./local.js";

const NARROW = "(max-width: 820px)";
const KEY = "gemcut-side";

export class Side {
  constructor() {
    this.narrow = matchMedia(NARROW);
    this.wide = remembered(KEY) !== "closed"; // how it stands where there is room
    this.drawer = false;
    this.narrow.addEventListener("change", () => this.apply());
    byId("side-open").addEventListener("click", () => this.toggle());
    byId("side-close").addEventListener("click", () => this.toggle());
    byId("veil").addEventListener("click", () => this.closeDrawer());
    this.apply();
  }

  get shown() {
    return this.narrow.matches ? this.drawer : this.wide;
  }

  toggle() {
    this.set(!this.shown);
    byId(this.shown ? "side-close" : "side-open").focus();
  }

  open() {
    this.set(true);
  }

  /** Close it where it covers the page; whether it did. */
  closeDrawer() {
    if (!this.narrow.matches || !this.drawer) return false;
    this.set(false);
    return true;
  }

  set(shown) {
    if (this.narrow.matches) {
      this.drawer = shown;
    } else {
      this.wide = shown;
      remember(KEY, shown ? "open" : "closed");
    }
    this.apply();
  }

  apply() {
    const covering = this.narrow.matches && this.shown;
    document.body.classList.toggle("side-shown", this.shown);
    byId("side").inert = !this.shown;
    byId("side-open").setAttribute("aria-expanded", String(this.shown));
    byId("veil").hidden = !covering;
    document.querySelector(".stage").inert = covering;
  }
}
