-- Traces, their exits, and garbage.
local bit = require("bit")
local h, s, t = 0, 0.0, {}
for i = 1, 3000000 do
  h = bit.bxor(bit.rol(h, 5), i)
  if i % 1000 == 0 then t[#t + 1] = tostring(h) end
end
for i = 1, 1000000 do s = s + math.sqrt(i) end
table.sort(t)
print(h, string.format("%.6f", s), #t, #table.concat(t, ","))
for i = 1, 200000 do t[i % 100 + 1] = { i, tostring(i) } end
print(t[5][2], pcall(function() local x = nil; return x.y end))
