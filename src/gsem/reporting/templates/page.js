"use strict";
for (const button of document.querySelectorAll("button.copy")) {
  const said = button.textContent;
  const tell = (text) => {
    button.textContent = text;
    setTimeout(() => { button.textContent = said; }, 2000);
  };
  // Where there is no clipboard (an old browser, a page without rights), a selected text area does it.
  const byHand = (text) => {
    const area = document.createElement("textarea");
    area.value = text;
    area.setAttribute("readonly", "");
    button.after(area);
    area.select();
    const done = document.execCommand("copy");
    if (done) area.remove();
    tell(done ? "Copied" : "Press Ctrl+C");
  };
  button.addEventListener("click", () => {
    const rows = [...button.parentElement.querySelectorAll("tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
    const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const text = rows.map((row) => row.map(quoted).join(",")).join("\n") + "\n";
    if (!navigator.clipboard) return byHand(text);
    navigator.clipboard.writeText(text).then(() => tell("Copied"), () => byHand(text));
  });
}
