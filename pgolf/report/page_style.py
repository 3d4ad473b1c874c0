"""The style sheet of the report page: one column on a phone, two on a desk, light and dark.

The colours of what is compared come from the Okabe-Ito palette, which colour-blind readers can
tell apart, darkened on white and lightened on black.
"""

LIGHT = {
    "page": "#f6f6f3", "card": "#ffffff", "ink": "#1b1d21", "soft": "#5a6068", "hair": "#e3e3de",
    "accent": "#0067a3", "good": "#00785a", "bad": "#b3261e",
    "a": "#0072b2", "b": "#d55e00", "c": "#009e73", "d": "#b5578f", "e": "#c98a00", "f": "#4aa5de",
    "rest": "#7d848c",
}  # fmt: skip
DARK = {
    "page": "#131518", "card": "#1b1e22", "ink": "#e9eaec", "soft": "#a2a9b2", "hair": "#31353b",
    "accent": "#6cbcf0", "good": "#4fcfa6", "bad": "#ff8a80",
    "a": "#56b4e9", "b": "#f5894a", "c": "#3cc8a0", "d": "#e39cc5", "e": "#f0c14b", "f": "#2f86bd",
    "rest": "#8e959e",
}  # fmt: skip


def _variables(theme: dict[str, str]) -> str:
    return ":root { " + " ".join(f"--{name}: {colour};" for name, colour in theme.items()) + " }"


STYLE = f"""
:root {{ color-scheme: light dark; }}
{_variables(LIGHT)}
@media (prefers-color-scheme: dark) {{ {_variables(DARK)} }}
""" + """
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
main { max-width: 1200px; margin: 0 auto; padding: 40px 24px 64px; }
h1, h2, p, dl, dd, figure { margin: 0; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; overflow-wrap: anywhere; }
h2 { font-size: 17px; line-height: 1.3; }
.under { color: var(--soft); margin-top: 6px; overflow-wrap: anywhere; }
.changed { display: flex; flex-wrap: wrap; gap: 6px; margin: 10px 0 0; padding: 0; }
.changed li {
  list-style: none;
  background: var(--card); border: 1px solid var(--hair); border-radius: 8px; padding: 1px 9px;
  font-size: 14px; overflow-wrap: anywhere;
}
.changed small { color: var(--soft); }
.card, figure, details {
  background: var(--card); border: 1px solid var(--hair); border-radius: 12px; padding: 20px 22px;
}
.notice { border-left: 4px solid var(--bad); margin-top: 20px; }
.good, .tiles .good { color: var(--good); }
.bad, .tiles .bad { color: var(--bad); }

.lead { display: grid; grid-template-columns: 270px 1fr; gap: 16px 32px; margin: 24px 0 20px; }
.score { border-right: 1px solid var(--hair); padding-right: 24px; }
.score strong {
  display: block; font-size: 58px; line-height: 1.15; font-weight: 650; letter-spacing: -0.03em;
}
.score span, dt { color: var(--soft); font-size: 14px; }
.tiles { display: grid; gap: 16px 24px; align-content: center;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tiles dd { font-size: 21px; line-height: 1.3; font-weight: 600; letter-spacing: -0.01em; }
.tiles small {
  display: block; font-size: 13px; font-weight: 400; letter-spacing: 0; color: var(--soft);
}
strong, dd, td, text { font-variant-numeric: tabular-nums; }

.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 20px; }
figcaption { color: var(--soft); font-size: 14px; margin-top: 10px; max-width: 75ch; }
figure ol { color: var(--soft); font-size: 14px; margin: 10px 0 0; padding-left: 2em; }
figure li { overflow-wrap: anywhere; }
svg { display: block; width: 100%; max-width: 620px; height: auto; margin: 14px auto 0; }
svg { stroke-linejoin: round; }
.bar:hover path { opacity: 0.7; }
/* Important over the style that each element has; a shape without fill notices no pointer. */
.band path { fill: var(--soft) !important; }
.band:hover path { opacity: 0.15 !important; }

.facts { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 20px; }
.facts, .more { margin-top: 20px; }
.facts dl { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 5px 16px; }
.facts dl { margin-top: 12px; }
.facts dd { font-size: 14px; overflow-wrap: anywhere; }
details { margin-top: 12px; padding: 0; }
summary { cursor: pointer; padding: 14px 22px; font-weight: 600; }
summary span { color: var(--soft); font-weight: 400; }
summary:focus-visible { outline: 2px solid var(--accent); border-radius: 12px; }
.inside { padding: 0 22px 20px; overflow-x: auto; }
.columns { columns: 3 290px; column-gap: 28px; }
.columns table { break-inside: avoid; margin-bottom: 18px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
caption { text-align: left; font-weight: 600; padding: 6px 0; }
th, td { text-align: left; vertical-align: top; padding: 4px 14px 4px 0; }
th, td { border-top: 1px solid var(--hair); overflow-wrap: anywhere; }
th { font-weight: 400; color: var(--soft); }
.number { text-align: right; white-space: nowrap; }
.foot { color: var(--soft); font-size: 14px; margin-top: 24px; max-width: 80ch; }

@media (max-width: 900px) {
  main { padding: 24px 14px 48px; }
  .charts, .facts, .lead { grid-template-columns: minmax(0, 1fr); }
  .score { border-right: 0; padding: 0 0 6px; }
  .card, figure { padding: 16px; }
}
@media print {
  body { background: none; }
  figure, .card { break-inside: avoid; }
}
"""
