"""From runs to a page: `runs` reads and packs them, `measures` scores them, `compare` has the
statistics, `tables` and `figures` show these. report.py and the analyses in results/ use them."""
