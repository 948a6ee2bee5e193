"""The report's style sheet: one column of cards, light and dark by the reader's own setting."""

# Twelve hues in one order, so that a phase keeps its colour on either ground.
_LIGHT = (
    "#3b6fd4 #e0772f #2f9e6e #b5489b #8a6d1f #38a3b8 "
    "#d1495b #7a68c9 #6f8f2f #a0623a #5f7183 #a9b4c0"
)
_DARK = (
    "#79a6ff #f4a261 #5fd39f #e58ad0 #d9b851 #67d0e4 "
    "#ff8b98 #b0a1ff #b2d36a #d69a72 #9fb1c4 #5f6c7b"
)


def _variables(colours: str) -> str:
    return "".join(f"--c{i}:{colour};" for i, colour in enumerate(colours.split()))


_SERIES = "".join(
    f".fill{i}{{fill:var(--c{i})}}.stroke{i}{{stroke:var(--c{i})}}.back{i}{{background:var(--c{i})}}"
    for i in range(12)
)

STYLE = f"""
:root {{
  color-scheme: light dark;
  --page: #f5f6f8; --card: #ffffff; --ink: #17202b; --soft: #5d6b7a; --line: #e2e6eb;
  --accent: #3b6fd4; --good: #1f7a52; --good-back: #def3e8; --wait: #8a5a00; --wait-back: #fdf0d5;
  {_variables(_LIGHT)}
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --page: #0f1318; --card: #171d24; --ink: #e6ebf1; --soft: #94a1b0; --line: #29323c;
    --accent: #79a6ff; --good: #7fe0b2; --good-back: #143528; --wait: #f3c677; --wait-back: #3a2c10;
    {_variables(_DARK)}
  }}
}}
* {{ box-sizing: border-box; }}
body {{
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}}
main {{ max-width: 1320px; margin: 0 auto; padding: 28px 20px 56px; }}
h1 {{
  font-size: 26px; line-height: 1.2; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere;
}}
h2 {{ font-size: 17px; margin: 36px 0 12px; letter-spacing: -.005em; }}
h2 small {{ color: var(--soft); font-weight: 400; font-size: 14px; margin-left: 8px; }}
h3 {{ font-size: 14px; margin: 0; font-weight: 600; }}
code, pre {{
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}}
header .top {{ display: flex; flex-wrap: wrap; gap: 10px 14px; align-items: center; }}
header p {{ margin: 6px 0 0; color: var(--soft); }}
.pill {{ padding: 2px 11px; border-radius: 99px; font-size: 13px; font-weight: 600; }}
.pill.done {{ color: var(--good); background: var(--good-back); }}
.pill.open {{ color: var(--wait); background: var(--wait-back); }}
.chips {{ display: flex; flex-wrap: wrap; gap: 6px; margin-top: 14px; }}
.chip {{
  background: var(--card); border: 1px solid var(--line); border-radius: 7px;
  padding: 2px 9px; font-size: 13px; overflow-wrap: anywhere;
}}
.chip b {{ font-weight: 500; color: var(--soft); margin-right: 5px; }}
.tiles {{
  display: grid; gap: 12px; margin-top: 20px;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
}}
.card, .tile {{ background: var(--card); border: 1px solid var(--line); border-radius: 12px; }}
.tile {{ padding: 12px 16px; }}
.tile span, .tile small {{ display: block; color: var(--soft); font-size: 13px; }}
.tile strong {{ display: block; font-size: 25px; line-height: 1.25; font-weight: 620; }}
.tile strong, .now, td.num {{ font-variant-numeric: tabular-nums; }}
.grid {{
  display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 285px), 1fr));
}}
.card {{ padding: 13px 14px 10px; min-width: 0; }}
.card .head {{ display: flex; gap: 10px; align-items: baseline; justify-content: space-between; }}
.now {{ font-size: 15px; font-weight: 620; white-space: nowrap; }}
.about {{ color: var(--soft); font-size: 12.5px; line-height: 1.4; margin: 1px 0 6px; }}
.legend {{ display: flex; flex-wrap: wrap; gap: 3px 14px; font-size: 12.5px; color: var(--soft); }}
.legend i, .name i {{
  display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px;
}}
.legend b {{ color: var(--ink); font-weight: 550; margin-left: 4px; }}
svg {{ display: block; width: 100%; height: auto; }}
.tick {{ fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }}
.grid line, line.grid {{ stroke: var(--line); stroke-width: 1; }}
line.zero {{ stroke: var(--soft); stroke-width: 1; opacity: .6; }}
.line {{ fill: none; stroke-width: 1.9; stroke-linejoin: round; stroke-linecap: round; }}
.band {{ opacity: .16; }}
.hit rect {{ fill: transparent; }}
.hit line {{ stroke: var(--soft) !important; stroke-dasharray: 2 3; }}
.hit line, .hit circle {{ opacity: 0; pointer-events: none; }}
.hit circle {{ stroke: var(--card); stroke-width: 1.5; }}
.hit:hover line, .hit:hover circle {{ opacity: 1; }}
.bar:hover {{ filter: brightness(1.12); }}
{_SERIES}
.scroll {{ overflow-x: auto; }}
.scroll svg {{ min-width: 760px; }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: 14px; margin-bottom: 14px; }}
.sample .text {{
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: 14px;
  max-height: 17em; overflow-y: auto; margin: 6px 0 4px;
}}
.sample .prompt {{ color: var(--soft); }}
.score {{
  font-size: 13px; font-weight: 620; border: 1px solid var(--line); border-radius: 99px;
  padding: 1px 10px; font-variant-numeric: tabular-nums;
}}
.rows {{ width: 100%; border-collapse: collapse; font-size: 14px; }}
.rows td {{ padding: 5px 14px 5px 0; border-top: 1px solid var(--line); vertical-align: top; }}
.rows tr:first-child td {{ border-top: 0; }}
.rows td.name {{ color: var(--soft); white-space: nowrap; width: 1%; }}
.rows td.value {{ overflow-wrap: anywhere; }}
.rows td.num {{ text-align: right; white-space: nowrap; width: 1%; padding-right: 0; }}
.meter {{ height: 11px; border-radius: 4px; min-width: 2px; margin-top: 5px; }}
pre {{ margin: 0; font-size: 13px; line-height: 1.5; overflow-x: auto; }}
pre .set {{ color: var(--accent); }}
pre .from {{ color: var(--soft); opacity: .8; }}
.command {{ white-space: pre-wrap; overflow-wrap: anywhere; margin-bottom: 8px; }}
details summary {{ cursor: pointer; font-size: 14px; font-weight: 600; padding: 2px 0 4px; }}
footer {{ color: var(--soft); font-size: 13px; margin-top: 36px; }}
@media (max-width: 640px) {{
  main {{ padding: 18px 12px 40px; }}
  .pair {{ grid-template-columns: 1fr; gap: 8px; margin-bottom: 22px; }}
}}
@media print {{ .card, .tile {{ break-inside: avoid; }} body {{ background: none; }} }}
"""
