"use strict";

// The colour scheme that was chosen, put on the page before it is drawn. Loaded in the head, by itself.
{
  const names = ["auto", "light", "dark"];
  const key = "dllm_ray.theme";

  const stored = () => {
    try {
      return names.includes(localStorage.getItem(key)) ? localStorage.getItem(key) : "auto";
    } catch {
      return "auto"; // storage is forbidden
    }
  };

  const show = name => {
    document.documentElement.dataset.theme = name;
    const button = document.getElementById("theme");
    if (button) button.querySelector("span").textContent = "Theme: " + name;
  };

  show(stored());
  document.addEventListener("DOMContentLoaded", () => {
    show(stored());
    document.getElementById("theme").addEventListener("click", () => {
      const name = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
      try {
        localStorage.setItem(key, name);
      } catch {
        // it holds until the page is left
      }
      show(name);
    });
  });
}
