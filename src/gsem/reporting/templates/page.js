"use strict";
for (const button of document.querySelectorAll("button.copy")) {
  const label = button.textContent;
  const show = (text) => {
    button.textContent = text;
    setTimeout(() => { button.textContent = label; }, 2000);
  };
  // Without a clipboard (an old browser, a page without permission) the text is copied from a text area.
  const copyFromArea = (text) => {
    const area = document.createElement("textarea");
    area.value = text;
    area.setAttribute("readonly", "");
    button.after(area);
    area.select();
    const copied = document.execCommand("copy");
    if (copied) area.remove();
    show(copied ? "Copied" : "Press Ctrl+C");
  };
  button.addEventListener("click", () => {
    const rows = [...button.parentElement.querySelectorAll("tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
    const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
    const text = rows.map((row) => row.map(quoted).join(",")).join("\n") + "\n";
    if (!navigator.clipboard) return copyFromArea(text);
    navigator.clipboard.writeText(text).then(() => show("Copied"), () => copyFromArea(text));
  });
}
