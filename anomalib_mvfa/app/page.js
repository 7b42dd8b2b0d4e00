// The page is light only, and what changes is spoken by screen readers.
() => {
  document.body.classList.remove("dark");
  for (const name of ["notes", "progress", "look_notes", "verdict", "correct_notes", "packing"]) {
    document.getElementById(name)?.setAttribute("role", "status");
  }
  document.addEventListener("click", event => {
    const button = event.target.closest("button.thumb");
    button?.closest(".gallery")?.dispatchEvent(new CustomEvent("choose", { detail: +button.dataset.index }));
  });
}
