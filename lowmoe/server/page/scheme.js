// Dark or light, before anything is painted.  A classic script: a module would run too late.
"use strict";
{
  const chosen = localStorage.getItem("lowmoe.scheme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.scheme = chosen;
}
