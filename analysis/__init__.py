"""From runs to a page: `runs` reads and packs them, `compare` has the statistics of their scores,
`tables` and `figures` show these. report.py and the analyses in results/ use all four."""
