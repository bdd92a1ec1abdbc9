// Dark or light, before anything is painted.  A classic script: a module would run too late.
"use strict";
{
  let chosen;
  try {
    chosen = localStorage.getItem("lowmoe.scheme");
  } catch {
    // The browser keeps nothing: its own scheme, then.
  }
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.scheme = chosen;
}
