print("base fetched")
