"""`gep app`: a page in the browser that plays a recording and shows what models make of it."""
