// Runs before the first paint, so that no wrong colours flash: the person's choice, or what the system says.
(() => {
  const KEY = "gemcut-theme";
  const root = document.documentElement;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try {
    chosen = localStorage.getItem(KEY);
  } catch {
    // storage is closed: the system decides
  }
  if (chosen !== "light" && chosen !== "dark") chosen = "system";

  const apply = () => {
    root.dataset.theme = chosen === "system" ? (system.matches ? "dark" : "light") : chosen;
  };
  system.addEventListener("change", apply);
  apply();

  window.gemcutTheme = {
    get: () => chosen,
    /** On to the next of system, light and dark; its name. */
    next: () => {
      chosen = { system: "light", light: "dark", dark: "system" }[chosen];
      try {
        if (chosen === "system") localStorage.removeItem(KEY);
        else localStorage.setItem(KEY, chosen);
      } catch {
        // it lasts as long as the page
      }
      apply();
      return chosen;
    },
  };
})();
